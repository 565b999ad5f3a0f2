"""Products of packed matrices in compiled kernels, against float arithmetic on the dequantised weight."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pingjia.errors import ModelError
from pingjia.quant import kernels
from pingjia.quant.group import dequantize_groups, pack_groups
from pingjia.quant.native import EXACT, Tiles, packed_matmul
from pingjia.quant.rows import dequantize_rows, pack_int4

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")

ACT_GROUP = 32  # columns that share a scale of the activations: kActGroup in kernels.h
SETS = kernels.isa_names() if kernels.available() else []


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.choose_isa(request.param)
    yield request.param
    kernels.choose_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = kernels.num_threads()
    yield
    kernels.set_num_threads(before)


def grouped(n: int, m: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random grouped INT4: (weight, scale, the floats it stands for)."""
    weight = pack_groups(torch.randint(-8, 8, (n, m)))
    scale = (torch.rand(n, m // group) / 8).half()
    return weight, scale, dequantize_groups(weight, scale)


def per_row(n: int, m: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random matrix in the published layout. Every byte occurs, -128 and -8 too."""
    values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, m), dtype=torch.int8)
    weight = pack_int4(values) if bits == 4 else values
    scale = torch.rand(n) / 8
    return weight, scale, dequantize_rows(weight, scale, bits)


MATRICES = st.one_of(
    st.tuples(st.just(4), st.integers(1, 70), st.integers(1, 9), st.sampled_from([32, 64, 128])),
    st.tuples(st.just(4), st.integers(1, 70), st.integers(1, 150).map(lambda half: 2 * half), st.none()),
    st.tuples(st.just(8), st.integers(1, 70), st.integers(1, 300), st.none()),
)


def matrix(bits: int, n: int, size: int, group: int | None) -> tuple[Tiles, torch.Tensor]:
    """(tiles, floats). `size` counts groups, or columns without groups."""
    weight, scale, wide = per_row(n, size, bits) if group is None else grouped(n, size * group, group)
    return Tiles.of(weight, scale, bits), wide


def error_bound(x: torch.Tensor, wide: torch.Tensor, activation_bits: int = 8) -> torch.Tensor:
    """What rounding x may change: in each group half a step of x times the weights; and float32 sums.

    A step is a 127th of the largest x of the group at 8 bits, a 254th of that at 16.
    """
    pad = -x.shape[1] % ACT_GROUP
    half_step = 0.5 / 127 / (1 if activation_bits == 8 else 254)
    largest = torch.nn.functional.pad(x.abs(), (0, pad)).unflatten(1, (-1, ACT_GROUP)).amax(2)
    weights = torch.nn.functional.pad(wide.abs(), (0, pad)).unflatten(1, (-1, ACT_GROUP)).sum(2)
    return 1.001 * half_step * largest @ weights.T + 2e-6 * (x.abs() @ wide.abs().T) + 1e-30


@given(MATRICES, st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def check_products(shape: tuple[int, int, int, int | None], batch: int, with_bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    tiles, wide = matrix(*shape)
    x = torch.randn(batch, tiles.m) * torch.logspace(-3, 2, batch)[:, None]
    bias = torch.randn(tiles.n) if with_bias else None
    wanted = torch.nn.functional.linear(x.double(), wide.double(), None if bias is None else bias.double())
    room = error_bound(x, wide, tiles.activation_bits)
    room = room if bias is None else room + 1e-5 * bias.abs()
    assert ((tiles.product(x, bias) - wanted).abs() <= room).all()


def test_every_shape_is_within_the_stated_error(isa: str) -> None:
    check_products()
    assert kernels.isa() == isa


@pytest.mark.parametrize(
    ("n", "m", "group"), [(576, 576, 64), (1536, 576, 32), (576, 1536, 128), (192, 4096, 128), (7, 11008, 64)]
)
@pytest.mark.parametrize("batch", [1, 7, 33])
def test_shapes_of_real_networks(isa: str, n: int, m: int, group: int, batch: int) -> None:
    torch.manual_seed(0)
    weight, scale, wide = grouped(n, m, group)
    x = torch.randn(batch, m)
    y = Tiles.of(weight, scale, 4).product(x)
    assert ((y - x @ wide.T).abs() <= error_bound(x, wide)).all()
    assert (y - x @ wide.T).norm() < 0.01 * y.norm()


@pytest.mark.parametrize("shape", [(4, 20, 3, 64), (8, 20, 200, None)])
def test_eight_bit_weights_get_sixteen_bit_activations(shape: tuple[int, int, int, int | None]) -> None:
    tiles, wide = matrix(*shape)
    x = torch.randn(9, tiles.m)
    wanted = x.double() @ wide.double().T
    errors = {bits: _error_of(tiles, x, wanted, bits) for bits in (8, 16, EXACT)}
    assert tiles.activation_bits == (8 if tiles.bits == 4 else 16)
    assert errors[EXACT] < 1e-6
    assert errors[16] < 1e-4
    assert 1e-3 < errors[8] < 1e-2


def _error_of(tiles: Tiles, x: torch.Tensor, wanted: torch.Tensor, activation_bits: int) -> float:
    y = packed_matmul(x, tiles.tiles, tiles.scales, None, *tiles.layout, activation_bits)
    return float((y - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(4, 50, 3, 64), (4, 40, 130, None), (8, 33, 77, None)])
def test_a_row_does_not_depend_on_its_batch(isa: str, shape: tuple[int, int, int, int | None]) -> None:
    torch.manual_seed(0)
    tiles, _ = matrix(*shape)
    x = torch.randn(70, tiles.m)
    alone = torch.cat([tiles.product(row[None]) for row in x])
    for batch in (2, 3, 5, 6, 7, 8, 13, 64, 70):
        assert torch.equal(tiles.product(x[:batch]), alone[:batch]), batch


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_threads_changes_nothing(count: int, threads: None) -> None:
    torch.manual_seed(0)
    tiles, _ = matrix(4, 1000, 4, 64)
    x = torch.randn(40, tiles.m)
    kernels.set_num_threads(1)
    alone = tiles.product(x)
    kernels.set_num_threads(count)
    assert kernels.num_threads() == count
    assert all(torch.equal(tiles.product(x), alone) for _ in range(50))


@given(MATRICES, st.sampled_from([torch.float16, torch.float32, torch.bfloat16]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_tiles_give_back_what_went_in(
    shape: tuple[int, int, int, int | None], scale_dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    bits, n, size, group = shape
    weight, scale, _ = per_row(n, size, bits) if group is None else grouped(n, size * group, group)
    scale = scale.to(scale_dtype)
    tiles = Tiles.of(weight, scale, bits)
    back_weight, back_scale = tiles.plain()
    assert torch.equal(back_weight, weight)
    assert back_weight.dtype == weight.dtype
    assert torch.equal(back_scale, scale)
    assert back_scale.dtype == scale_dtype


@given(MATRICES, st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_rows_are_exact(shape: tuple[int, int, int, int | None], seed: int) -> None:
    torch.manual_seed(seed)
    tiles, wide = matrix(*shape)
    ids = torch.randint(0, tiles.n, (2, 3))
    assert torch.equal(tiles.rows(ids), wide[ids])
    assert torch.equal(tiles.dequantize(), wide)


def test_tiles_take_no_more_memory_than_the_plain_tensors() -> None:
    weight, scale, _ = grouped(96, 576, 64)
    assert Tiles.of(weight, scale, 4).num_bytes == weight.nbytes + scale.nbytes


@pytest.mark.parametrize("ids", [[-1], [0, 7]])
def test_rows_outside_the_matrix_are_refused(ids: list[int]) -> None:
    with pytest.raises(IndexError, match=f"rows {min(ids)} to {max(ids)} asked of a matrix with 7 rows"):
        matrix(4, 7, 1, 32)[0].rows(torch.tensor(ids))


def test_groups_the_kernels_cannot_take_are_refused() -> None:
    with pytest.raises(ModelError, match="groups of 16 columns: the kernels take multiples of 32"):
        Tiles.of(pack_groups(torch.zeros(2, 64, dtype=torch.int8)), torch.ones(2, 4), 4)


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"x is \[2, 31\] on cpu; this matrix takes 32 columns"):
        matrix(4, 7, 1, 32)[0].product(torch.zeros(2, 31))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_spoils_only_itself(isa: str, bad: float) -> None:
    tiles, _ = matrix(4, 20, 2, 64)
    x = torch.randn(9, tiles.m)
    good = tiles.product(x)
    x[4, 100] = bad
    y = tiles.product(x)
    assert y[4].isnan().all()
    others = [i for i in range(9) if i != 4]
    assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e30])
def test_extreme_sizes_of_the_input(isa: str, size: float) -> None:
    tiles, wide = matrix(8, 20, 64, None)
    x = torch.full((3, 64), size)
    wanted = x.double() @ wide.double().T
    assert torch.allclose(tiles.product(x).double(), wanted, rtol=0.02, atol=1e-34)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 64)])
def test_products_keep_the_shape(shape: tuple[int, ...]) -> None:
    tiles, wide = matrix(4, 20, 1, 64)
    x = torch.randn(shape)
    y = tiles.product(x)
    assert y.shape == (*shape[:-1], 20)
    assert torch.allclose(y, x @ wide.T, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_half_precision_out(dtype: torch.dtype) -> None:
    tiles, _ = matrix(4, 20, 1, 64)
    x = torch.randn(3, 64).to(dtype)
    y = tiles.product(x, torch.zeros(20, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y, tiles.product(x.float()).to(dtype))


def test_an_input_with_gaps_between_its_rows() -> None:
    tiles, _ = matrix(4, 20, 1, 64)
    x = torch.randn(5, 3, 64)
    assert torch.equal(tiles.product(x[:, 1]), tiles.product(x[:, 1].contiguous()))


@given(MATRICES, st.integers(1, 9), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_with_a_gradient_the_product_is_exact(shape: tuple[int, int, int, int | None], batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    tiles, wide = matrix(*shape)
    x, bias = torch.randn(batch, tiles.m, requires_grad=True), torch.randn(tiles.n)
    y = tiles.product(x, bias)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.allclose(y, torch.nn.functional.linear(x, wide, bias), rtol=1e-4, atol=1e-3)
    assert torch.allclose(x.grad, upstream @ wide, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        assert not tiles.product(x).requires_grad


@pytest.mark.parametrize("activation_bits", [8, 16, EXACT])
def test_the_operator_obeys_torch(activation_bits: int) -> None:
    tiles, _ = matrix(4, 20, 2, 64)
    x = torch.randn(3, tiles.m, requires_grad=activation_bits == EXACT)
    arguments = (x, tiles.tiles, tiles.scales, torch.randn(20), *tiles.layout, activation_bits)
    torch.library.opcheck(torch.ops.pingjia.packed_matmul.default, arguments)
    torch.library.opcheck(torch.ops.pingjia.packed_rows.default, (torch.arange(5), *arguments[1:3], *tiles.layout))


def test_the_operator_on_shapes_alone() -> None:
    tiles, _ = matrix(4, 20, 2, 64)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(2, 5, tiles.m))
        y = packed_matmul(x, tiles.tiles, tiles.scales, None, *tiles.layout, 8)
    assert y.shape == (2, 5, 20)


# ---- threads and processes


def test_products_from_several_python_threads(threads: None) -> None:
    kernels.set_num_threads(2)
    tiles, _ = matrix(4, 500, 4, 64)
    inputs = [torch.randn(1 + i, tiles.m) for i in range(4)]
    wanted = [tiles.product(x) for x in inputs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        if not all(torch.equal(tiles.product(inputs[i]), wanted[i]) for _ in range(100)):
            wrong.append(i)

    workers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork with threads alive is the point
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_products_after_a_fork(threads: None) -> None:
    kernels.set_num_threads(2)
    tiles, _ = matrix(4, 500, 4, 64)
    x = torch.randn(3, tiles.m)
    wanted = tiles.product(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(tiles.product(x), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(tiles.product(x), wanted)
