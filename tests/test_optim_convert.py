"""tw.optim.convert_state_dict: from other options of this package, and from other libraries' states."""

import copy

import pytest
import torch

import tilewise as tw
from optimizer_cases import (
    CASES,
    MAKERS,
    assert_same_state,
    copies,
    give_gradients,
    moments,
    parameters,
    snapshot,
    train,
)
from tilewise.optim import convert_state_dict, forms

SHAPES = [(64, 80), (130, 33), (5,)]
OPTIONS = {
    "4": {"state_bits": 4},
    "8": {"state_bits": 8},
    "32": {"state_bits": 32},
    "rank1": {"second_moment": "rank1"},
    "factored": {"second_moment": "factored"},
}
pytestmark = pytest.mark.usefixtures("one_thread", "home")
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def trained(make, steps=3, **options):
    params = parameters(shapes=SHAPES)
    optimizer = make(params, **{"min_quantized_size": 6} | options)
    train(optimizer, params, steps)
    return params, optimizer


def options_of(make, names=OPTIONS):
    unserved = ("rank1", "factored") if make.func in (tw.optim.SGD, tw.optim.Lion) else ()
    return [OPTIONS[name] for name in names if name not in unserved]


# ---- this package's ----


@every_optimizer
def test_between_all_forms(make):
    """Moments survive up to the coarser form's precision; the same form is copied bit by bit."""
    for source in options_of(make):
        params, optimizer = trained(make, **source)
        for target in options_of(make):
            other = make(copies(params), min_quantized_size=6, lr=0.5, **target)
            before = snapshot(optimizer)
            converted = convert_state_dict(optimizer.state_dict(), other)
            assert_same_state(snapshot(optimizer), before)
            other.load_state_dict(converted)
            assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
            assert other.param_groups[0]["state_bits"] == target.get("state_bits", 4)
            if source == target:
                assert_same_state(snapshot(other), before)
            for p, q in zip(params, other.param_groups[0]["params"], strict=True):
                assert float(other.state[q]["step"]) == 3
                new = moments(other, q)
                for name, old in moments(optimizer, p).items():
                    form = forms.find(other.state[q], name)
                    assert (new[name] - old).norm() <= COARSE[form.label, form.bits] * old.norm()
            give_gradients(other.param_groups[0]["params"])
            other.step()


COARSE = {("float32", 32): 0, ("block", 8): 0.02, ("block", 4): 0.25, ("rank1", 4): 0.35, ("factored", 32): 1.0}


@pytest.mark.parametrize(
    "form,signed",
    [(forms.BLOCK4, True), (forms.BLOCK8, True), (forms.BLOCK4, False), (forms.BLOCK8, False), (forms.RANK1, False)],
)
@pytest.mark.parametrize("shape", [(64, 130), (1, 5), (3, 129)], ids=str)
def test_encoding_is_idempotent(form, signed, shape):
    """What was decoded is encoded to the same codes, also where a block's largest magnitude is negative."""
    values = torch.randn(shape) * torch.randn(shape).abs() ** 3
    values = -values.abs() if signed and shape[0] == 1 else values if signed else values.square()
    first = forms.encode(form, "x", values, signed)
    decoded = forms.decode(form, "x", first, values.shape, signed)
    second = forms.encode(form, "x", decoded, signed)
    again = forms.decode(form, "x", second, values.shape, signed)
    torch.testing.assert_close(again, decoded, rtol=2.0**-21, atol=0)
    n = values.numel()
    if form.bits == 8:
        assert torch.equal(first["x"].flatten()[:n], second["x"].flatten()[:n])
    elif n % 128 == 0:
        assert torch.equal(first["x"], second["x"])


def test_encoding_blocks_of_negative_extremes():
    """A block whose largest magnitude is negative holds that value itself; nothing is further away than half a gap."""
    for bits, form in ((4, forms.BLOCK4), (8, forms.BLOCK8)):
        values = torch.randn(40, forms.BLOCK[bits])
        values[:, 3] = 8.0
        values[::2, 3] = -8.0
        tensors = forms.encode(form, "x", values, True)
        got = forms.decode(form, "x", tensors, values.shape, True)
        torch.testing.assert_close(got[::2, 3], values[::2, 3], rtol=2.0**-21, atol=0)
        codes, scales = tw.optim.quantize_state(values, signed=True, bits=bits)
        assert torch.equal(tensors["x"][1::2], codes[1::2])
        book = forms._book(bits, True)
        gap = (book[1:] - book[:-1]).max() / 2
        assert ((got - values).abs() <= gap * tensors["x_scale"][:, None] * 1.0001).all()


def test_books():
    """Sixteen and 256 values in ascending order, as codes count."""
    for bits in (4, 8):
        for signed in (True, False):
            book = forms._book(bits, signed)
            assert len(book) == 2**bits and (book[1:] > book[:-1]).all() and book[-1] == 1
    assert forms._book(4, True)[0].item() == pytest.approx(-0.8875) and forms._book(8, True)[0] == pytest.approx(
        -0.99297, abs=1e-5
    )


@every_optimizer
def test_nothing_is_shared(make):
    """Training on does not change the dict that was converted."""
    _, optimizer = trained(make, state_bits=32)
    source = optimizer.state_dict()
    converted = convert_state_dict(source, make(parameters(shapes=SHAPES), state_bits=32))
    for index, state in source["state"].items():
        for name, value in state.items():
            assert value.data_ptr() != converted["state"][index][name].data_ptr()


def test_version_2_of_adamw():
    """Interleaved scales, as this package's first version kept them."""
    params, optimizer = trained(MAKERS["AdamW"])
    old = snapshot(optimizer)
    for group in old["param_groups"]:
        group["state_version"] = 2
    for state in old["state"].values():
        if "exp_avg_scale" in state:
            state["scales"] = torch.stack([state.pop("exp_avg_scale"), state.pop("exp_avg_sq_scale")], 1)
    other = MAKERS["AdamW"](copies(params), min_quantized_size=6)
    with pytest.raises(ValueError, match="state_version"):
        other.load_state_dict(old)
    other.load_state_dict(convert_state_dict(old, other))
    assert_same_state(snapshot(other), snapshot(optimizer))


# ---- torch.optim's ----


@pytest.mark.parametrize(
    "case", [c for n, c in CASES.items() if "Lion" not in n], ids=[n for n in CASES if "Lion" not in n]
)
def test_from_torch(case):
    """32-bit states continue torch's training as torch itself does."""
    theirs = parameters(shapes=SHAPES)
    source = case.theirs(theirs, **case.options)
    train(source, theirs, 3)
    ours = copies(theirs)
    optimizer = case.ours(ours, state_bits=32)
    converted = convert_state_dict(source.state_dict(), optimizer)
    optimizer.load_state_dict(converted)
    for name, value in case.options.items():
        assert optimizer.param_groups[0][name] == value
    for _ in range(3):
        give_gradients(ours, theirs)
        source.step(), optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    low = case.ours(copies(theirs), state_bits=4)
    low.load_state_dict(convert_state_dict(source.state_dict(), low))
    train(low, low.param_groups[0]["params"])


def test_from_torch_before_the_first_step():
    for name, case in CASES.items():
        if name not in ("Lion", "Adagrad", "Adagrad-initial"):
            params = parameters(shapes=SHAPES)
            optimizer = case.ours(copies(params))
            optimizer.load_state_dict(convert_state_dict(case.theirs(params, **case.options).state_dict(), optimizer))
            assert not optimizer.state


def test_hooks_of_loading():
    """A pre-hook may replace the dict before it is judged: foreign states load through a conversion."""
    params = parameters()
    foreign = torch.optim.AdamW(copies(params))
    train(foreign, foreign.param_groups[0]["params"])
    optimizer, calls = tw.optim.AdamW(params), []
    optimizer.register_load_state_dict_pre_hook(lambda o, d: tw.optim.convert_state_dict(d, o))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o))
    optimizer.load_state_dict(foreign.state_dict())
    assert calls == [optimizer] and optimizer.state[params[0]]["exp_avg"].dtype is torch.uint8


# ---- bitsandbytes', in its published format ----


def dynamic_map(signed):
    """The 256 values of bitsandbytes' 8-bit code."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middle = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += middle.tolist() + ((-middle).tolist() if signed else [])
    return torch.tensor(sorted(values))


def quantized_8bit(values, signed, block=256):
    """(codes of the tensor's shape, absmax per block, decoded values)."""
    book, flat = dynamic_map(signed), values.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    codes = (padded[..., None] / absmax[:, None, None] - book).abs().argmin(-1)
    decoded = (book[codes] * absmax[:, None]).flatten()[: len(flat)].view(values.shape)
    return codes.flatten()[: len(flat)].view(values.shape).to(torch.uint8), absmax, decoded


def bitsandbytes_state(values_by_state, bits, step=7, wrapped=False):
    state, decoded = {}, []
    for i, (values, signed) in enumerate(values_by_state, 1):
        if bits == 32 or values.numel() < 4096:
            state[f"state{i}"] = values
            decoded.append(values)
            continue
        codes, absmax, exact = quantized_8bit(values, signed)
        state |= {f"state{i}": codes, f"qmap{i}": dynamic_map(signed), f"absmax{i}": absmax}
        decoded.append(exact)
    state = {"__bnb_optimizer_quant_state__": state} if wrapped else state
    return {"step": step, **state}, decoded


BITSANDBYTES = {  # which moments state1, state2 are; the group's own numbers; what they become
    "AdamW": (("exp_avg", "exp_avg_sq"), {"betas": (0.8, 0.95), "eps": 1e-6}, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "SGD": (("momentum_buffer",), {"betas": (0.7, 0.0), "eps": 0.0}, {"momentum": 0.7, "dampening": 0.0}),
    "Lion": (("exp_avg",), {"betas": (0.8, 0.95), "eps": 0.0}, {"betas": (0.8, 0.95)}),
    "RMSprop": (("square_avg",), {"betas": (0.95, 0.0), "eps": 1e-6}, {"alpha": 0.95, "eps": 1e-6}),
    "Adagrad": (("sum",), {"betas": (0.0, 0.0), "eps": 1e-9}, {"eps": 1e-9}),
}


def bitsandbytes_dict(name, bits, wrapped=False):
    states, decoded = {}, {}
    for i, shape in enumerate(SHAPES):
        values = [
            torch.randn(shape) if m in ("exp_avg", "momentum_buffer") else torch.rand(shape)
            for m in BITSANDBYTES[name][0]
        ]
        signed = [m in ("exp_avg", "momentum_buffer") or len(values) == 1 for m in BITSANDBYTES[name][0]]
        states[i], decoded[i] = bitsandbytes_state(list(zip(values, signed, strict=True)), bits, wrapped=wrapped)
    group = {"lr": 0.25, "weight_decay": 0.125, **BITSANDBYTES[name][1], "params": [0, 1, 2]}
    return {"state": states, "param_groups": [group]}, decoded


@pytest.mark.parametrize("name", BITSANDBYTES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_from_bitsandbytes(name, bits, wrapped):
    source, decoded = bitsandbytes_dict(name, bits, wrapped)
    params = parameters(shapes=SHAPES)
    for target in (32, 8, 4):
        optimizer = MAKERS[name](copies(params), state_bits=target)
        optimizer.load_state_dict(convert_state_dict(copy.deepcopy(source), optimizer))
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.25 and group["weight_decay"] == 0.125
        assert all(group[key] == value for key, value in BITSANDBYTES[name][2].items())
        for i, p in enumerate(group["params"]):
            assert float(optimizer.state[p]["step"]) == 7
            got = moments(optimizer, p)
            for moment, values in zip(BITSANDBYTES[name][0], decoded[i], strict=True):
                form = forms.find(optimizer.state[p], moment)
                error = (got[moment] - values).norm() / values.norm()
                # 8-bit blocks and codes are the same as there, except that squares of one-state rules are signed there
                assert error <= {32: 0, 8: 0.02, 4: 0.25}[form.bits]
                if form.bits == 8 and bits == 8 and name in ("AdamW", "SGD", "Lion"):
                    assert error <= 1e-6
        train(optimizer, group["params"])


# ---- torchao's: tensors with codes, scale and qmap ----


class Quantized(torch.Tensor):
    """Stands for OptimState8bit, OptimState4bit and OptimStateFp8."""

    @staticmethod
    def __new__(cls, shape, **parts):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, shape, **parts):
        self.__dict__.update(parts)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor of torchao, expected its parts to be used")


def torchao_state(values, kind, signed):
    blocks = values.view(-1, 256 if kind != "4" else 128)
    scale = blocks.abs().amax(1)
    if kind == "fp8":
        codes = (blocks / scale[:, None] * 448).to(torch.float8_e4m3fn)
        return Quantized(values.shape, codes=codes.view(values.shape), scale=scale / 448), codes.float() * scale[
            :, None
        ] / 448
    book = dynamic_map(signed) if kind == "8" else torch.linspace(-1 if signed else 1 / 16, 1, 16)
    codes = (blocks[..., None] / scale[:, None, None] - book).abs().argmin(-1)
    decoded = book[codes] * scale[:, None]
    if kind == "4":
        flat = codes.flatten()
        packed = (flat[::2] << 4 | flat[1::2]).to(torch.uint8)
        return Quantized(values.shape, codes=packed, scale=scale, qmap=book), decoded
    return Quantized(values.shape, codes=codes.view(values.shape).to(torch.uint8), scale=scale, qmap=book), decoded


@pytest.mark.parametrize("kind", ["4", "8", "fp8"])
def test_from_torchao(kind):
    shape = (64, 80)
    m, v = torch.randn(shape), torch.rand(shape)
    (first, exact_m), (second, exact_v) = torchao_state(m, kind, True), torchao_state(v, kind, False)
    small = {"step": torch.tensor(3.0), "exp_avg": torch.randn(5), "exp_avg_sq": torch.rand(5)}
    state = {0: {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second}, 1: small}
    group = {
        "lr": torch.tensor(0.25),
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": False,
        "params": [0, 1],
    }
    params = parameters(shapes=[shape, (5,)])
    optimizer = tw.optim.AdamW(params, state_bits=32)
    optimizer.load_state_dict(convert_state_dict({"state": state, "param_groups": [group]}, optimizer))
    got = moments(optimizer, params[0])
    torch.testing.assert_close(got["exp_avg"], exact_m.view(shape), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got["exp_avg_sq"], exact_v.view(shape), rtol=1e-6, atol=1e-7)
    assert torch.equal(moments(optimizer, params[1])["exp_avg"], small["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == 0.25 and float(optimizer.state[params[0]]["step"]) == 3


# ---- bad input ----


def adamw_dict():
    params = parameters(shapes=SHAPES)
    source = torch.optim.AdamW(params)
    train(source, params)
    return source.state_dict()


def own_dict():
    return trained(MAKERS["AdamW"])[1].state_dict()


WRONG = {
    "no dict": (TypeError, lambda: None),
    "no state": (ValueError, lambda: {"param_groups": []}),
    "other groups": (ValueError, lambda: adamw_dict() | {"param_groups": []}),
    "state of another optimizer": (ValueError, lambda: trained(MAKERS["SGD"])[1].state_dict()),
    "torch's of another": (ValueError, lambda: spoiled(adamw_dict(), lambda s: s.pop("exp_avg"))),
    "other shape": (ValueError, lambda: spoiled(adamw_dict(), lambda s: s.update(exp_avg=torch.zeros(3)))),
    "integers": (TypeError, lambda: spoiled(adamw_dict(), lambda s: s.update(exp_avg=torch.zeros(64, 80).int()))),
    "no tensor": (TypeError, lambda: spoiled(adamw_dict(), lambda s: s.update(exp_avg="?"))),
    "no step": (TypeError, lambda: spoiled(adamw_dict(), lambda s: s.update(step="?"))),
    "amsgrad": (NotImplementedError, lambda: spoiled(adamw_dict(), lambda s: s.update(max_exp_avg_sq=0))),
    "entry": (TypeError, lambda: adamw_dict() | {"state": {0: []}}),
    "index": (ValueError, lambda: adamw_dict() | {"state": {9: {}}}),
    "own truncated": (ValueError, lambda: spoiled(own_dict(), lambda s: s.update(exp_avg=s["exp_avg"][1:]))),
    "bitsandbytes' of another": (ValueError, lambda: bitsandbytes_dict("SGD", 8)[0]),
    "bitsandbytes without blocks": (
        NotImplementedError,
        lambda: spoiled(bitsandbytes_dict("AdamW", 8)[0], lambda s: s.pop("absmax1")),
    ),
    "bitsandbytes truncated": (
        ValueError,
        lambda: spoiled(bitsandbytes_dict("AdamW", 8)[0], lambda s: s.update(absmax1=s["absmax1"][:-3])),
    ),
}


def spoiled(state_dict, change):
    state_dict = copy.deepcopy(state_dict)
    change(state_dict["state"][0])
    return state_dict


@pytest.mark.parametrize("name", WRONG)
def test_wrong_dicts(name):
    error, make = WRONG[name]
    _, optimizer = trained(MAKERS["AdamW"])
    before = snapshot(optimizer)
    with pytest.raises(error, match="convert_state_dict: "):
        convert_state_dict(make(), optimizer)
    assert_same_state(snapshot(optimizer), before)
