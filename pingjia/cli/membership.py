"""`--consul` of `pingjia serve` and `pingjia worker`: from flags to a member of a pool."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pingjia.cli.console import errors
from pingjia.errors import UserError

if TYPE_CHECKING:
    from pingjia import Engine
    from pingjia.cluster.member import Member
    from pingjia.cluster.settings import ConsulSettings, MemberSettings
    from pingjia.worker import Worker

CONSUL_HELP = "Join a pool: http://host:8500 of a Consul agent. Token and TLS: CONSUL_HTTP_TOKEN, CONSUL_CACERT, ..."
SERVICE_HELP = "The pool. Replicas of one pool serve the same model."
NAME_HELP = "This replica's name in the pool; host-port without."
ADVERTISE_HELP = "Address or address:port under which others reach it; what it listens on without."
WEIGHT_HELP = "Its part of the requests beside the others', instead of the measured speed (tenths of a token/s)."


@dataclass(frozen=True, slots=True)
class Flags:
    """What was given on the command line."""

    consul: str
    service: str
    name: str | None = None
    advertise: str | None = None
    weight: int | None = None


@dataclass(frozen=True, slots=True)
class Joining:
    """Settings of a member that is to be; Consul has answered."""

    consul: ConsulSettings
    settings: MemberSettings
    weight: int | None


def joining_of(flags: Flags, host: str, port: int, port_flag: str = "--port") -> Joining:
    """Checked settings. Raises UserError: Consul does not answer, or nobody could reach this replica."""
    from pingjia.cluster.consul import check_consul
    from pingjia.cluster.settings import MemberSettings, from_environment
    from pingjia.recipe import build

    if port == 0:
        raise UserError(f"a member of a pool needs a port that others can know: give {port_flag} instead of 0")
    consul = from_environment(flags.consul)
    address, _, given_port = _split(flags.advertise or _own_address(host, consul.url))
    known_port = int(given_port or port)
    name = flags.name or f"{socket.gethostname().partition('.')[0]}-{known_port}"
    values = {"service": flags.service, "name": name, "address": address, "port": known_port}
    settings = build(values, MemberSettings, flat=(), name="--consul")
    check_consul(consul)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # four lines a beat
    return Joining(consul, settings, flags.weight)


def member_of(joining: Joining, worker: Worker, engine: Engine, seats: int, *, is_balanced: bool = True) -> Member:
    """A member that the pool takes, its speed measured. Raises UserError when the pool refuses it."""
    from pingjia import __version__
    from pingjia.cluster import Member, calibrate
    from pingjia.cluster.member import About
    from pingjia.cluster.speed import Speed
    from pingjia.types import Message

    prompt = engine.tokenizer.render([Message("user", "你好 hello")])
    rates = asyncio.run(calibrate(worker, prompt, seats=seats))
    speed = Speed(rates)
    shown = ", ".join(f"{rate.tokens_per_s:.1f} with {rate.at_once:g} at once" for rate in rates)
    errors.print(f"measured tokens/s: {shown}", markup=False)
    about = About(__version__, seats, joining.weight, is_balanced)
    member = Member(joining.settings, joining.consul, worker, about, speed, adapt=worker)
    member.check()
    return member


def _split(advertise: str) -> tuple[str, str, str]:
    """address:port or address -> its parts; an IPv6 address with a port stands in brackets."""
    if advertise.startswith("["):
        address, _, rest = advertise[1:].partition("]")
        parts = (address, ":", rest.removeprefix(":"))
    elif advertise.count(":") > 1:
        parts = (advertise, "", "")
    else:
        parts = advertise.partition(":")
    if not parts[0] or (parts[2] and not parts[2].isdigit()):
        raise UserError(f"--advertise {advertise!r}: write ADDRESS or ADDRESS:PORT")
    return parts


def _own_address(host: str, consul_url: str) -> str:
    """What to tell others: the address listened on, or for all of them, the one that Consul is reached from."""
    import httpx

    from pingjia.remote import is_loopback

    if host not in ("0.0.0.0", "::"):  # noqa: S104
        return host
    consul = httpx.URL(consul_url).host
    if is_loopback(consul):
        raise UserError(f"--host {host} says not where others reach this replica; give --advertise ADDRESS")
    try:
        family = socket.AF_INET6 if ":" in consul else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing: asks the kernel for the way
            probe.connect((consul, 9))
            return str(probe.getsockname()[0])
    except OSError as e:
        raise UserError(f"no way to Consul at {consul}: {e}; give --advertise ADDRESS") from None
