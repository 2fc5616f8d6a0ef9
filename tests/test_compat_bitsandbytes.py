"""tw.compat.bitsandbytes: the names and arguments of bitsandbytes on this package's optimizers."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch

import tilewise as tw
from optimizer_cases import assert_equal, copies, give_gradients, parameters, train
from tilewise.compat import bitsandbytes as bnb
from tilewise.optim import forms

OWN = {  # bitsandbytes' own arguments before optim_bits
    "Adam": "lr betas eps weight_decay amsgrad",
    "AdamW": "lr betas eps weight_decay amsgrad",
    "SGD": "lr momentum dampening weight_decay nesterov",
    "Lion": "lr betas weight_decay",
    "RMSprop": "lr alpha eps weight_decay momentum centered",
    "Adagrad": "lr lr_decay weight_decay initial_accumulator_value eps",
}
SHARED = "args min_8bit_size percentile_clipping block_wise"
NEEDED = {"SGD": {"lr": 0.1, "momentum": 0.9}}
FAMILIES = list(OWN)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures(family):
    paged = " is_paged" if family in ("Adam", "AdamW", "Lion") else ""
    for suffix in ("", "8bit", "32bit"):
        names = list(inspect.signature(getattr(bnb.optim, family + suffix)).parameters)
        bits = "optim_bits " if not suffix or family in ("Adam", "AdamW", "Adagrad") else ""
        assert " ".join(names) == f"params {OWN[family]} {bits}{SHARED}{paged}"
        assert getattr(bnb, family + suffix) is getattr(bnb.optim, family + suffix)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_this_package(family):
    """Each class, and the bits it stands for."""
    fixed = {"decoupled_weight_decay": True} if family in ("Adam", "AdamW") else {}
    for suffix, bits, options in (("8bit", 8, {}), ("32bit", 32, {}), ("", 32, {}), ("", 8, {"optim_bits": 8})):
        ours, theirs = (lambda p: (p, copies(p)))(parameters())
        a = getattr(bnb.optim, family + suffix)(ours, **NEEDED.get(family, {}), **options)
        b = getattr(tw.optim, family)(theirs, **NEEDED.get(family, {}), state_bits=bits, **fixed)
        for _ in range(2):
            give_gradients(ours, theirs)
            a.step(), b.step()
        assert_equal(ours, theirs)
        name = list(a.moments(a.param_groups[0]))[-1]
        assert [forms.find(a.state[p], name).bits for p in ours] == [bits, bits, 32, 32, 32]


def test_adam_decays_as_bitsandbytes_does():
    """Decoupled; AdamW is Adam with another default."""
    ours, theirs = (lambda p: (p, copies(p)))(parameters())
    a, b = bnb.optim.Adam(ours, weight_decay=0.01), bnb.optim.AdamW(theirs)
    give_gradients(ours, theirs)
    a.step(), b.step()
    assert_equal(ours, theirs)
    assert bnb.optim.Adam(parameters()).param_groups[0]["weight_decay"] == 0


def test_positional_arguments_and_args():
    params = parameters()
    optimizer = bnb.optim.AdamW(params, 1e-2, (0.8, 0.9), 1e-6, 0.1, False, 8, None, 100, 100, True, False)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-6, 0.1)
    assert (group["state_bits"], group["min_quantized_size"]) == (8, 100)
    args = SimpleNamespace(optim_bits=8, min_8bit_size=10, percentile_clipping=100, block_wise=True)
    group = bnb.optim.Lion(params, args=args).param_groups[0]
    assert (group["state_bits"], group["min_quantized_size"]) == (8, 10)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies(twin):
    params = parameters()
    optimizer = bnb.optim.AdamW8bit(params)
    train(optimizer, params)
    twins, other = twin((params, optimizer))
    give_gradients(params, twins)
    optimizer.step(), other.step()
    assert_equal(params, twins)
    assert isinstance(other, bnb.optim.AdamW8bit)
    other.load_state_dict(optimizer.state_dict())


def test_global_manager():
    manager = bnb.optim.GlobalOptimManager.get_instance()
    assert manager is bnb.GlobalOptimManager.get_instance()
    model = torch.nn.Sequential(torch.nn.Linear(70, 80), torch.nn.Linear(80, 90), torch.nn.Linear(90, 64))
    manager.register_parameters(model.parameters())
    manager.override_config(model[0].weight, "optim_bits", 32)
    manager.register_module_override(model[1], "weight", {"min_8bit_size": 10**6})
    optimizer = bnb.optim.Adam8bit(model.parameters())
    train(optimizer, list(model.parameters()))
    assert [forms.find(optimizer.state[layer.weight], "exp_avg").bits for layer in model] == [32, 32, 8]
    manager.override_config([model[0].weight, model[2].weight], key_value_dict={"optim_bits": 8})
    with pytest.raises(NotImplementedError, match="override_config: key is 'lr'"):
        manager.override_config(model[0].weight, "lr", 0.1)


def test_stable_embedding():
    assert bnb.nn.StableEmbedding is tw.nn.StableEmbedding


WRONG = [
    ("AdamW", {"optim_bits": 16}, ValueError, "optim_bits is 16, expected 8 or 32"),
    ("AdamW8bit", {"optim_bits": 4}, ValueError, "optim_bits is 4, expected 8"),
    ("AdamW8bit", {"percentile_clipping": 5}, NotImplementedError, "percentile_clipping is 5, expected 100"),
    ("Lion8bit", {"block_wise": False}, NotImplementedError, "block_wise is False"),
    ("Adam", {"is_paged": True}, NotImplementedError, "is_paged is True"),
    ("Adam", {"amsgrad": True}, NotImplementedError, "amsgrad is True"),
    ("RMSprop8bit", {"centered": True}, NotImplementedError, "centered is True"),
    ("Adagrad", {"args": SimpleNamespace(max_unorm=1.0)}, NotImplementedError, "max_unorm is 1.0"),
    ("AdamW", {"lr": -1.0}, ValueError, "lr is -1.0"),
    ("AdamW", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ("AdamW", {"min_8bit_size": -1}, ValueError, "min_quantized_size is -1"),
    ("SGD", {}, TypeError, "lr"),
    ("SGD8bit", {"lr": 0.1, "optim_bits": 8}, TypeError, "optim_bits"),
]


@pytest.mark.parametrize("name,options,error,message", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_wrong_arguments(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(bnb.optim, name)(parameters(), **options)
