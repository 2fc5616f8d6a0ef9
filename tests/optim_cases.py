"""Parameters in the middle of a training, and what a step should make of them."""

import dataclasses

import torch

import tilewise as tw
from harness.judge import assert_accurate, draws, yardsticks
from tilewise.optim.step import Options, optimizer_step
from tilewise.reference import optim as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["32bit", "8bit", "4bit", "rank1", "factored"]
RULES = {
    "adamw": Options("adam", 1e-2, 0.9, 0.999, 1e-8, 0.1, decoupled_weight_decay=True),
    "adam": Options("adam", 1e-2, 0.9, 0.999, 1e-8, 0.1),
    "sgd": Options("sgd", 1e-2, weight_decay=0.1),
    "momentum": Options("sgd", 1e-2, 0.9, weight_decay=0.1, dampening=0.3),
    "nesterov": Options("sgd", 1e-2, 0.9, nesterov=True),
    "lion": Options("lion", 1e-2, 0.9, 0.99, weight_decay=0.1, decoupled_weight_decay=True),
    "rmsprop": Options("rmsprop", 1e-2, 0.0, 0.99, 1e-8),
    "rmsprop momentum": Options("rmsprop", 1e-2, 0.9, 0.99, 1e-8, 0.1),
    "adagrad": Options("adagrad", 1e-2, eps=1e-10, lr_decay=0.1),
}


def keeps_first(o):
    return o.rule in ("adam", "lion") or (o.rule in ("sgd", "rmsprop") and o.beta1 > 0)


def keeps_second(o):
    return o.rule in ("adam", "rmsprop", "adagrad")


def forms_of(o):
    """The forms of states that make a difference to a rule."""
    return FORMS if keeps_second(o) else FORMS[:3] if keeps_first(o) else FORMS[:1]


CASES = [(name, form) for name, o in RULES.items() for form in forms_of(o)]


def heavy_tailed(*shape):
    """Magnitudes over many decades, as moments have."""
    return torch.randn(shape) * torch.randn(shape).abs() ** 3


def none():
    return torch.empty(0)


@dataclasses.dataclass
class Slot:
    """One entry of every list of an optimizer_step."""

    param: torch.Tensor
    grad: torch.Tensor
    first: torch.Tensor = dataclasses.field(default_factory=none)
    first_scales: torch.Tensor = dataclasses.field(default_factory=none)
    second: torch.Tensor = dataclasses.field(default_factory=none)
    second_scales: torch.Tensor = dataclasses.field(default_factory=none)
    residual: torch.Tensor = dataclasses.field(default_factory=none)
    step: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor(6.0))
    rows: int = 0
    stream: int = 0

    def tensors(self):
        return {name: t for name, t in vars(self).items() if torch.is_tensor(t)}

    def map(self, change):
        """The step counter is in host memory and stays there."""
        changed = {name: change(t) for name, t in self.tensors().items() if name != "step"}
        return dataclasses.replace(self, **changed, step=self.step.clone())

    def to(self, device):
        return self.map(lambda t: t.to(device.torch, copy=True))


def make_slot(shape, dtype=torch.float32, grad_dtype=None, o=RULES["adamw"], form="4bit", stream=0):
    slot = Slot(torch.randn(shape).to(dtype), heavy_tailed(*shape).to(grad_dtype or dtype), stream=stream)
    m = heavy_tailed(*shape) * 1e-2
    v = m.square() + (heavy_tailed(*shape) * 1e-2).square()
    if keeps_first(o):
        slot.first, slot.first_scales = _held(m, "4bit" if form in ("rank1", "factored") else form, True)
    if keeps_second(o) and form in ("rank1", "factored"):
        slot.rows = shape[0]
        slot.second, slot.second_scales = _shared(v, form)
    elif keeps_second(o):
        slot.second, slot.second_scales = _held(v, form, False)
    if o.rule == "lion":
        _clear_signs(slot, o)
    return slot


def _held(x, form, signed):
    if form == "32bit":
        return x, none()
    bits = {} if form == "4bit" else {"bits": 8}
    return tw.optim.quantize_state(x, signed=signed, **bits)


def _shared(v, form):
    rows = v.shape[0]
    if form == "rank1":
        scales = reference.rank1_scales(v, rows)
        return reference.pack(reference.quantize_rank1(v, scales, rows)), scales
    matrix = v.reshape(rows, -1)
    return none(), torch.cat([matrix.mean(1), matrix.mean(0)])


def _clear_signs(slot, o):
    """No direction so near zero that roundings decide its sign."""
    m, g = first_moment(slot, torch.float64), slot.grad.double()
    between, size = o.beta1 * m + (1 - o.beta1) * g, o.beta1 * m.abs() + (1 - o.beta1) * g.abs()
    slot.grad = torch.where(between.abs() < 1e-4 * size, 2 * slot.grad + 1e-3, slot.grad).to(slot.grad.dtype)


# ---- a step ----

COLUMNS = ["first", "first_scales", "second", "second_scales"]


def call(slots, o, **scalars):
    """optimizer_step in place on the slots."""
    column = lambda name: [getattr(s, name) for s in slots]  # noqa: E731
    optimizer_step(
        column("param"),
        column("grad"),
        column("step"),
        o,
        **{name: column(name) for name in COLUMNS},
        residuals=column("residual"),
        rows=column("rows"),
        streams=column("stream"),
        **scalars,
    )


def run_step(slots, device, o=RULES["adamw"], **scalars):
    """The slots after a step on the device; those given stay as they are."""
    slots = [s.to(device) for s in slots]
    call(slots, o, **{name: t.to(device.torch) for name, t in scalars.items()})
    return [s.map(lambda t: t.cpu()) for s in slots]


# ---- what it should be ----


def first_moment(slot, dtype):
    return _elements(slot.first, slot.first_scales, slot.param.shape, True, dtype)


def second_moment(slot, dtype):
    """Not of a factored one."""
    if not slot.rows:
        return _elements(slot.second, slot.second_scales, slot.param.shape, False, dtype)
    indices = reference.unpack(slot.second)
    return reference.dequantize_rank1(indices, slot.second_scales.to(dtype), slot.rows, slot.param.shape)


def _elements(values, scales, shape, signed, dtype):
    if values.dtype is torch.float32:
        return values.to(dtype)
    bits = bits_of(values)
    indices = reference.unpack(values) if bits == 4 else values.long()
    return reference.dequantize(indices, scales.to(dtype), shape, signed, bits)


def bits_of(codes):
    return 8 if codes.shape[1] == 256 else 4


def _book(bits, signed):
    if bits == 8:
        numerators, units = reference.codes8(signed)
        return numerators * units
    return reference.SIGNED_CODES if signed else reference.UNSIGNED_CODES


def exact_step(slot, o, dtype):
    """(p, m, v, second_scales) in the given dtype, from the slot's states; what the rule does not keep is None."""
    p = master(slot).to(dtype)
    m = first_moment(slot, dtype) if keeps_first(o) else None
    v, scales = None, None
    if slot.rows and not slot.second.numel():
        g = reference.effective_gradient(o, p, slot.grad.to(dtype))
        scales = reference.factored_scales(o, slot.second_scales.to(dtype), g, slot.rows)
        v = lambda: reference.factored_moment(scales, slot.rows, p.shape)  # noqa: E731
    elif keeps_second(o):
        v = second_moment(slot, dtype)
    p, m, v = reference.step(o, p, slot.grad.to(dtype), m, v, int(slot.step) + 1)
    if slot.rows and scales is None:
        scales = reference.rank1_scales(v, slot.rows)
    return p, m, v, scales


def master(slot):
    return reference.join_master(slot.param, slot.residual) if slot.residual.numel() else slot.param


def assert_step(got, slot, o=RULES["adamw"]):
    """Parameters at most 2x as far from float64 as plain torch in the parameter's dtype; states the nearest codes."""
    p, dtype = master(got), master(slot).dtype
    exact, m, v, scales = exact_step(slot, o, torch.float64)
    assert_accurate("p", p, *yardsticks([_plain(slot, o, dtype)], _floats(slot, o), draws(p.numel())), 2)
    ulp = torch.finfo(torch.float32).eps
    error, rounding = (p.double() - exact).norm(), (exact.to(dtype).double() - exact).norm()
    assert error <= 1.1 * rounding + 1e-4 * (exact - master(slot).double()).norm() + ulp * exact.norm()
    assert float(got.step) == float(slot.step) + 1
    roundings = Roundings(slot, o, exact, m, v)
    if m is not None:
        _assert_moment("first", first_moment(got, torch.float64), m, roundings.first, got.first, got.first_scales, True)
    if slot.rows:
        close = reference.rank1_scales(roundings.second, slot.rows) + 3e-6 * scales
        assert ((got.second_scales.double() - scales).abs() <= close).all()
    if slot.rows and slot.second.numel():
        _assert_rank1(got, v, roundings.second)
    elif v is not None and not slot.rows:
        new = second_moment(got, torch.float64)
        _assert_moment("second", new, v, roundings.second, got.second, got.second_scales, False)


class Roundings:
    """How far float32 may take the moments of every element from float64: `first`, `second`."""

    def __init__(self, slot, o, p, m, v):
        p, grad = master(slot).double(), slot.grad.double()
        g = reference.effective_gradient(o, p, grad)
        of_g = 2e-7 * (grad.abs() + o.weight_decay * p.abs())  # the sum may cancel
        if v is not None:
            v = v if torch.is_tensor(v) else v()
            share = 1 if o.rule == "adagrad" else 1 - o.beta2
            self.second = 5e-7 * v + share * (2 * g.abs() + of_g) * of_g
        if m is None:
            return
        old = first_moment(slot, torch.float64).abs()
        self.first = 5e-7 * (old + m.abs() + g.abs()) + of_g
        if o.rule == "rmsprop":  # the average of g / sqrt(v)
            relative = of_g / g.abs().clamp(min=1e-300) + self.second / v.clamp(min=1e-300)
            self.first = 5e-7 * (old + m.abs()) + (old + m.abs()) * relative


def _floats(slot, o):
    """What a step depends on, as floats that may be redrawn."""
    m = first_moment(slot, torch.float32) if keeps_first(o) else None
    v = second_moment(slot, torch.float32) if keeps_second(o) and not (slot.rows and not slot.second.numel()) else None
    return [master(slot), slot.grad, m, slot.second_scales if v is None and keeps_second(o) else v]


def _plain(slot, o, dtype):
    factored = slot.rows and not slot.second.numel()

    def plain(p, g, m, v):  # in float32, then one rounding
        wide = torch.promote_types(p.dtype, torch.float32)
        p, g, m, v = (None if t is None else t.to(wide) for t in (p, g, m, v))
        if factored:
            scales = reference.factored_scales(o, v, reference.effective_gradient(o, p, g), slot.rows)
            v = lambda: reference.factored_moment(scales, slot.rows, p.shape)  # noqa: E731
        new = reference.step(o, p, g, m, v, int(slot.step) + 1)[0]
        return [new if wide is torch.float64 else new.to(dtype)]

    return plain


def _assert_moment(name, new, exact, close, values, scales, signed):
    """As close as roundings allow; where quantised, the nearest codes up to that."""
    if values.dtype is torch.float32:
        assert ((new - exact).abs() <= close).all(), name
        return
    bits = bits_of(values)
    pad = lambda x: reference.blocks(x, 32 * bits)  # noqa: E731
    tops = pad(exact).abs().amax(1)
    assert ((scales.double() - tops).abs() <= pad(close).amax(1)).all(), name
    distance = _distance(_book(bits, signed) * scales.double()[:, None], pad(exact))
    assert ((pad(new) - pad(exact)).abs() <= distance + 2 * pad(close)).flatten()[: exact.numel()].all(), name


def _distance(books, x):
    """From every element of a row to the nearest entry of the row's ascending book."""
    books, x = books.contiguous(), x.contiguous()
    above = torch.searchsorted(books, x).clamp(1, books.shape[1] - 1)
    return torch.minimum((books.gather(1, above) - x).abs(), (books.gather(1, above - 1) - x).abs())


def _assert_rank1(got, exact, close):
    scales = reference.structured_scales(got.second_scales.double(), got.rows, exact.shape)
    distance = _distance(reference.UNSIGNED_CODES * scales.reshape(-1, 1), exact.reshape(-1, 1))
    new = second_moment(got, torch.float64)
    assert ((new - exact).abs() <= distance.view(exact.shape) + 2 * close + 1e-6 * exact).all()
