"""What all optimizers of this package share: states in few bits, one operator call per group and device."""

from operator import is_

import torch
from torch.optim import Optimizer

from tilewise.optim import forms
from tilewise.optim.checkpoint import STATE_VERSION, adopt_state_dict
from tilewise.optim.distributed import local_entry, sharded_state_dict
from tilewise.optim.memory import MemoryReport, memory_report
from tilewise.optim.options import check_group, complete
from tilewise.optim.overrides import resolved
from tilewise.optim.rows import Row, Rows, WholeGroup
from tilewise.optim.step import Options, optimizer_step
from tilewise.optim.tensors import CPU, learning_rate, local, local_pair, scalar_on, stream_of


class LowBitOptimizer(Optimizer):
    """Base of the optimizers: a torch.optim.Optimizer whose states take 4, 8 or 32 bits per element.

    A subclass names its rule in the core (``include/tilewise/optim.h`` has the formulas) and its moments, and says
    which of its options are which of the core's numbers.

    All accept by name:

        state_bits          4 (1.06 bytes per parameter for two moments), 8 (2.03) or 32 (8)
        block_size          elements per scale: None or the served one, 128 at 4 bits and 256 at 8
        second_moment       how squares are held: "block"; "rank1" (4 bits, one scale per row and column, an element's
                            is the smaller of its two); "factored" (only the means of rows and columns). The last two
                            apply to parameters of two dimensions or more, seen as a matrix at the split of their
                            dimensions where rows + columns is least, and to those only where it is at most numel / 32
        min_quantized_size  parameters with fewer elements (of the whole parameter, if it is sharded) keep float32
        stochastic_rounding round bfloat16 and float16 parameters up or down at random, without bias
        seed                of these random numbers
        master_weights      keep 16 more bits of bfloat16 parameters: they train as float32 ones would
        maximize            ascend
        capturable          step counters on the device, so that a CUDA graph may be replayed
        foreach, fused      accepted for torch.optim's sake: every step is one fused pass
        differentiable      only False

    ``state_bits``, ``block_size``, ``second_moment`` and ``min_quantized_size`` decide at a parameter's first step,
    together with :func:`override`; later changes do not touch existing states. Every option may differ between
    parameter groups.

    Raises:
        TypeError, ValueError, NotImplementedError: an option that is unknown or of a wrong type, out of range, or
            without a kernel. Options are checked again before every step, and then nothing has changed.
    """

    rule: str
    first: str | None = None  # names of the moments in a parameter's state, those of torch.optim
    second: str | None = None
    lacks: tuple[str, ...] = ()  # options of all that it does not have
    moments_alone = True  # whether nothing else is kept, so that states belong to elements and can be sharded anew
    host_tensors: tuple[str, ...] = ()  # of a state, those in host memory beside the counter

    def __init__(self, params, options: dict, **own):
        what = type(self).__name__
        defaults = own | complete(what, options, self.lacks if self.second else (*self.lacks, "second_moment"))
        check_group(what, defaults, defaults)
        self.options, self._rows, self._groups = tuple(defaults), {}, {}
        super().__init__(params, defaults | {"state_version": STATE_VERSION})

    # ---- what a subclass says about itself ----

    @staticmethod
    def numbers(group: dict) -> dict:
        """The fields of step.Options that this optimizer's own options are."""
        raise NotImplementedError

    def rule_of(self, group: dict) -> tuple[str, str | None, str | None]:
        """(rule, name of the first moment, name of the second)."""
        return self.rule, self.first, self.second

    def moments(self, group: dict) -> dict[str, bool]:
        """{name of a moment that is kept: whether it is signed}, the first moment first."""
        names = {self.first: True} if self.first and group.get("momentum", 1) > 0 else {}
        return names | ({self.second: False} if self.second else {})

    def new_moment(self, form: forms.Form, name: str, shape, group: dict, device) -> dict:
        """The tensors of a moment before the first step."""
        return forms.zeros(form, name, shape, device)

    def host_tensors_of(self, group: dict) -> tuple[str, ...]:
        """The tensors of a state that are in host memory; the counter is unless ``capturable``."""
        return self.host_tensors if group["capturable"] else ("step", *self.host_tensors)

    def new_others(self, p, group: dict) -> dict:
        """The tensors of a state beside counter, moments and residual before the first step."""
        return {}

    def converted_others(self, p, group: dict, state: dict) -> dict:
        """These with what ``state``, which has them all, holds; made by an optimizer of other options."""
        return {}

    def other_tensors(self, where: str, p, group: dict, state: dict) -> dict:
        """{name: (dtype, shape)} of those that a state must have.

        Of a new one if ``state`` is empty. Raises ValueError or TypeError, after ``where``, if ``state`` does not tell.
        """
        return {}

    def check_values(self, where: str, state: dict) -> None:
        """Raises ValueError if those tensors have values that no step leaves."""

    def planned_forms(self, p, group) -> dict[str, forms.Form]:
        """{name of a moment that is kept: the form that a new one gets}."""
        first, second = forms.planned(local(p).shape, p.numel(), resolved(p, group))
        return {name: first if name == self.first else second for name in self.moments(group)}

    def initial_state(self, p, group, held=None) -> dict:
        """A parameter's state before its first step; beside what is held already, if anything is."""
        part, held = local(p), held or {}
        counter = part.device if group["capturable"] else CPU
        state = {"step": torch.zeros((), dtype=torch.float32, device=counter)}
        for name, form in self.planned_forms(p, group).items():
            if forms.find(held, name) is None:
                state |= self.new_moment(form, name, part.shape, group, part.device)
        if group["master_weights"] and part.dtype is not torch.float32 and "residual" not in held:
            state["residual"] = torch.zeros(part.shape, dtype=torch.int16, device=part.device)
        return state | (held or self.new_others(p, group))

    # ---- as torch.optim.Optimizer ----

    def add_param_group(self, param_group):
        """As in torch.optim.Optimizer; a group that raises is not added."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            check_group(type(self).__name__, self.param_groups[-1], self.options)
        except Exception:
            del self.param_groups[before:]
            raise

    def state_dict(self):
        """As in torch.optim.Optimizer: of sharded parameters (DTensors) the moments are float32 DTensors, which take 8
        bytes per parameter held here while the dict lives (:mod:`tilewise.optim.distributed`).

        Raises:
            NotImplementedError: of :class:`Shampoo` with sharded parameters.
        """
        return sharded_state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict):
        """Takes over a dict of :meth:`state_dict`; the states are copied, to the device of each parameter.

        :func:`convert_state_dict` makes one that fits from those of other options, and of other libraries.

        Raises:
            ValueError, TypeError, NotImplementedError: it does not fit this optimizer; nothing is changed.
        """
        state_dict = state_dict.copy() if isinstance(state_dict, dict) else state_dict
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.__setstate__(adopt_state_dict(self, state_dict, local_entry))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.options = tuple(name for name in self.defaults if name != "state_version")
        self._rows, self._groups = {}, {}

    @property
    def _step_supports_amp_scaling(self):
        """Whether torch.amp.GradScaler may leave found_inf and grad_scale to the step.

        Counters in host memory cannot follow a skip that only the device knows of; GradScaler then asks the device.
        """
        return all(
            group["capturable"] or all(p.device.type == "cpu" for p in group["params"]) for group in self.param_groups
        )

    def memory_report(self, named_parameters=None) -> MemoryReport:
        """What the states of every parameter take, before the first step too.

        Args:
            named_parameters: pairs such as ``model.named_parameters()`` gives; without, the names that the optimizer
                was given, or "group.index".

        Example::

            print(optimizer.memory_report(model.named_parameters()))
        """
        return memory_report(self, named_parameters)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient; returns the closure's loss."""
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them before anything changes
            check_group(type(self).__name__, group, self.options)
        for call in self._calls():
            self._step_rows(*call)
        return loss

    def _check_capture(self):
        """Raises while a CUDA graph is captured unless all groups are capturable."""
        newer = getattr(self, "_accelerator_graph_capture_health_check", None)
        (newer or self._cuda_graph_capture_health_check)()

    # ---- one call of the operator ----

    def _calls(self):
        """[(group, params, gradients, rows)] of the parameters that have gradients, by group and device."""
        calls, start = [], 0
        for group in self.param_groups:
            calls += self._calls_of(group, start)
            start += len(group["params"])
        return calls

    def _calls_of(self, group, start):
        kind, params = (group["capturable"], group["master_weights"], *self.moments(group)), group["params"]
        grads, whole = [p.grad for p in params], self._groups.get(start)
        if whole is not None and whole.fits(params, grads, kind, self.state):
            return [(group, params, grads, whole.rows)]
        of_device = {}
        for index, p in enumerate(params, start):
            if p.grad is not None:
                param, grad = local_pair(type(self).__name__, p)
                row = self._row(p, param, group, kind, index)
                of_device.setdefault(param.device, []).append((param, grad, row))
        calls = [(group, *map(list, zip(*entries, strict=True))) for entries in of_device.values()]
        return [(*call, Rows(rows)) for *call, rows in calls]

    def _row(self, p, param, group, kind, index):
        row, state = self._rows.get(index), self.state.get(p) or {}
        if row is not None and row.fits(p, kind, state):
            return row
        state = self.initial_state(p, group, state)
        counter = param.device if group["capturable"] else CPU
        if state["step"].device != counter:
            state["step"] = state["step"].to(counter)
        columns, rows, kept = [], 0, self.moments(group)
        for name in self.rule_of(group)[1:]:
            form = forms.find(state, name) if name in kept else None
            columns.append(None if form is None else state.get(name))
            columns.append(None if form is None or form.scale is None else state[name + form.scale])
            if form is not None and form.by_matrix:
                rows = forms.as_matrix(param.shape)[0]
        numbers = index, stream_of(p, index)
        moments = *columns, state.get("residual"), rows
        return Row(p, kind, state, tuple(state.values()), *numbers, state["step"], *moments)

    def _step_rows(self, group, params, grads, rows):
        device = params[0].device
        lr, lr_tensor = learning_rate(group["lr"], device)
        rule, first_name, second_name = self.rule_of(group)
        options = Options(
            rule,
            lr,
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
            capturable=group["capturable"],
            seed=group["seed"],
            **self.numbers(group),
        )
        columns = rows.columns
        kept = self.moments(group)
        optimizer_step(
            params,
            grads,
            columns.step,
            options,
            first=columns.first if first_name in kept else (),
            first_scales=columns.first_scales if first_name in kept else (),
            second=columns.second if second_name in kept else (),
            second_scales=columns.second_scales if second_name in kept else (),
            residuals=columns.residual,
            rows=columns.rows,
            streams=columns.stream,
            lr=lr_tensor,
            found_inf=scalar_on(device, getattr(self, "found_inf", None)),
            grad_scale=scalar_on(device, getattr(self, "grad_scale", None)),
        )
        self._keep(group, params, rows)

    def _keep(self, group, params, rows):
        """The rows, and their states, of a step that was taken."""
        start = rows[0].index
        whole = self._groups.get(start)
        if whole is not None and whole.rows is rows:
            return
        for row in rows:
            if self._rows.get(row.index) is not row:
                self.state[row.p], self._rows[row.index] = row.state, row
        if len(params) == len(group["params"]) and all(map(is_, params, group["params"])):
            self._groups[start] = WholeGroup(rows)
