"""Several replicas as one service: who is alive (Consul), who is next (weights, affinity), nginx in front.

A replica is one process that answers HTTP requests (`pingjia serve`): `member.py` keeps it in a pool, `watch.py` writes
the pool into nginx's configuration, `rollout.py` changes one replica after the other, `affinity.py` chooses a replica
for a conversation, `plan.py` says how many are needed. Never imports torch.
"""

from typing import TYPE_CHECKING, Any

__all__ = [
    "Consul", "ConsulSettings", "Member", "MemberSettings", "PrefixAffinity", "Replica", "calibrate", "check_consul",
    "from_environment", "read_replicas", "select",
]  # fmt: skip

if TYPE_CHECKING:
    from pingjia.cluster.affinity import PrefixAffinity
    from pingjia.cluster.calibration import calibrate
    from pingjia.cluster.consul import Consul, check_consul
    from pingjia.cluster.member import Member
    from pingjia.cluster.pool import select
    from pingjia.cluster.replica import Replica, read_replicas
    from pingjia.cluster.settings import ConsulSettings, MemberSettings, from_environment

_HOMES = {
    "Consul": "consul",
    "ConsulSettings": "settings",
    "Member": "member",
    "MemberSettings": "settings",
    "PrefixAffinity": "affinity",
    "Replica": "replica",
    "calibrate": "calibration",
    "check_consul": "consul",
    "from_environment": "settings",
    "read_replicas": "replica",
    "select": "pool",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.cluster' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pingjia.cluster.{_HOMES[name]}"), name)
