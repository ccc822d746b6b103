"""A GPU that is pretended: its tensors lie on the CPU, and mixing them with the CPU's is an error.

No GPU is needed.  So a forgotten device=... or .to(device) is found on any machine, and every copy
between the host and the device is counted.  What a real GPU computes, and how fast, this does not
tell.
"""

import collections
import pathlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import astar_search
import eval as evaluation
import policy
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
TO_HOST = ("cpu", "tolist", "item", "__bool__", "__int__", "__float__")

# -------------------------------------------------------------------------------- The pretended GPU


def is_on_gpu(x):
    """A storage is marked, so all views of a tensor are on the same device."""
    return getattr(x.untyped_storage(), "on_gpu", False)


def tensors_in(tree):
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Every operation, those of autograd too: results are where the arguments are."""

    moving = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = tensors_in((args, kwargs))
        devices = {is_on_gpu(x) for x in found if x.ndim > 0 or is_on_gpu(x)}  # as in CUDA
        if len(devices) == 2 and not self.moving:
            raise RuntimeError(f"{function}: some arguments are on the GPU, some on the CPU")
        results = function(*args, **(kwargs or {}))
        if True in devices and not self.moving:
            for x in tensors_in(results):
                x.untyped_storage().on_gpu = True
        return results


class PretendGPU(TorchFunctionMode):
    """Inside, the device cuda:0 exists.  `copies` counts those to and from it, by function."""

    def __init__(self):
        self.operations = Operations()
        self.copies = collections.Counter()

    def __enter__(self):
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.operations.__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__ and is_on_gpu(args[0]):
            return GPU
        if function == torch.Tensor.is_cuda.__get__:
            return is_on_gpu(args[0])
        if name == "mm" and "out_dtype" in kwargs:  # the CPU does not have it
            return args[0].to(kwargs["out_dtype"]) @ args[1].to(kwargs["out_dtype"])
        if name in TO_HOST and is_on_gpu(args[0]):
            self.copies["to host: " + name] += 1
        if name == "numpy" and is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        device = CPU if name == "cpu" else kwargs.get("device")
        if name == "to":  # x.to(device) and x.to(dtype) are one function
            for x in args[1:]:
                device = x if isinstance(x, (str, torch.device)) else device
        kind = torch.device(device).type if device is not None else None
        if kind == "cuda":  # it is made on the CPU and marked
            if name == "to":
                args = [CPU if isinstance(x, (str, torch.device)) else x for x in args]
            if "device" in kwargs:
                kwargs["device"] = CPU
        result = function(*args, **kwargs)
        if kind in ("cuda", "cpu"):
            result = self.place(result, kind == "cuda", name)
        return result

    def place(self, x, on_gpu, name):
        """x itself if it is there already, else a copy."""
        if is_on_gpu(x) == on_gpu:
            return x
        if name in ("to", "tensor", "as_tensor"):  # zeros, arange, ... are made on the GPU
            self.copies["to GPU: " + name] += on_gpu
        self.operations.moving = True
        x = x.clone() if name in ("to", "cpu") else x
        self.operations.moving = False
        x.untyped_storage().on_gpu = on_gpu
        return x


@pytest.fixture
def gpu():
    """A pretended GPU.  What a run on one sets for the whole process is undone."""
    with PretendGPU() as gpu:
        yield gpu
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_forgotten_device_is_noticed(gpu):
    """The pretended GPU itself: views, gradients, moved modules are where a real one has them."""
    layer = torch.nn.Linear(3, 2).to("cuda")
    x = torch.ones(4, 3, device=layer.weight.device)
    layer(x[1:]).sum().backward()
    assert layer.weight.grad.device == x.T.device == GPU
    assert (x * torch.tensor(2.0)).device == GPU  # a number may come from the CPU
    assert x.cpu().device == torch.ones(3).device == CPU
    for other in (torch.ones(4, 3), torch.ones(4, 1), x.cpu()):
        with pytest.raises(RuntimeError, match="some on the CPU"):
            x + other
    with pytest.raises(TypeError):
        x.numpy()


# ----------------------------------------------------------------------------------------- The code

PROMPTS = [[5, 6, 7, 8, 9], [4], [3, 2, 10]]


def rollouts_on(device, method, dtype=torch.float32):
    """(Rollouts, log pi (B, T-1) by policy.score on the device) of the tiny base."""
    model, tokenizer = policy.load_policy(str(ROOT / "tiny_base"), dtype, device)
    options = astar_search.Options(policy.stop_tokens(model, tokenizer), K=4, max_new_tokens=7)
    expander = astar_search.Expander(model, PROMPTS, options.max_new_tokens)
    trees = method(astar_search.root_keys(3, 0, range(3)), expander, options)
    rollouts = astar_search.collect(trees, expander)
    part = rollouts.select(range(len(rollouts)), device)
    log_prob, entropy = policy.score(model, part.tokens, part.mask)
    (log_prob + entropy).sum().backward()
    assert all(p.grad.device == p.device for p in model.parameters())
    return rollouts, log_prob.detach().cpu()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("method", (astar_search.search, astar_search.sample))
def test_rollouts_and_scores_on_a_gpu(method, dtype):
    """The same numbers as on the CPU, which is what computes them, but for rounding."""
    rollouts, log_prob = rollouts_on("cpu", method, dtype)
    with PretendGPU():
        on_gpu, log_prob_on_gpu = rollouts_on("cuda", method, dtype)
    for name, column in rollouts.columns().items():
        assert torch.allclose(getattr(on_gpu, name), column, atol=1e-5), name
    assert torch.allclose(log_prob_on_gpu, log_prob, atol=1e-5)


def test_copies_a_round(gpu):
    """Guards against copies that creep in: a real GPU is idle during each.

    To the device: tokens with rows, four numbers a node, slots, g with G, and keys twice, because
    there are more tokens than children are screened.  To the host: the children.
    """
    model, _ = policy.load_policy(str(ROOT / "tiny_base"), device="cuda")
    expander = astar_search.Expander(model, PROMPTS, 7)
    gpu.copies.clear()
    options = astar_search.Options(eos=(1,), K=4, max_new_tokens=7)
    astar_search.search(astar_search.root_keys(3, 0, range(3)), expander, options)
    rounds = expander.forwards
    assert gpu.copies == {"to GPU: tensor": 6 * rounds, "to host: cpu": rounds}


def test_a_run_of_train_and_eval_on_a_gpu(gpu, tmp_path):
    """One iteration with search, samples, reference model, head, checkpoint; then eval.py."""
    flags = """
        --loss apo --iterations 1 --problems-per-iteration 4 --rollouts-per-problem 2
        --apo-samples 2 --minibatches 1 --epochs 1 --eval-problems 2 --max-new-tokens 4
        --max-nodes 8 --device cuda --samples 0
    """
    folder = tmp_path / "run"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    train.main([*flags.split(), "--output-dir", str(folder)])
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    flags = "--n 2 --decode astar --max-nodes 8 --max-new-tokens 4 --device cuda --model"
    evaluation.main([*flags.split(), str(folder / "checkpoint_iter_1")])
