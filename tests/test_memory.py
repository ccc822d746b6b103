"""examples/memory.py: the memory of a run on paper, against pencil and paper and a real search."""

import pathlib

import pytest
import torch

from examples import memory

import astar_search
import data
import eval as evaluation
import policy
import train

ROOT = pathlib.Path(train.__file__).parent
QWEN = ROOT / "examples" / "qwen2.5-3b"


@pytest.fixture(scope="module")
def qwen():
    """The outline of Qwen2.5-3B."""
    return memory.outline(str(QWEN))


def memory_of(model, flags, world_size=1, offload=False):
    """Bytes by name, for prompts of 100 tokens and 1000 bytes of activations a token and block."""
    config, _, _ = train.parse_arguments(flags.split())
    return memory.memory(
        config, model, prompt=100, activations=1000.0, world_size=world_size, offload=offload
    )


def test_memory_of_the_3b_model_by_hand(qwen):
    """Qwen2.5-3B on four ranks in bf16.

    Guards against a factor lost: of two, of the ranks, of the layers, of keys and values.
    """
    flags = (
        "--mixed-precision bf16 --rollout-batch 2 --max-new-tokens 50 --max-nodes 700 "
        "--micro-batch 3"
    )
    need = memory_of(qwen, flags, world_size=4)
    head = 2048 * 2048 + 2048 + 2 * 2048 + 2
    parameters = 3_085_938_688 + head
    assert need["weights"] == 4 * parameters / 4
    assert need["gradients"] == 4 * parameters / 4
    assert need["moments"] == 8 * parameters / 4
    # Two problems of 100 + 700 tokens are 1600 rows.  The tables begin with 2 * 200 -> 1024 rows
    # and double.
    assert need["K/V"] == 2048 * 36 * (2 * 2 * 128) * 2
    # On the host: the nodes of two problems, and the hidden states of 64/4.
    assert need["trees"] == 1600 * 1100 + 16 * 800 * 2048 * 2
    # Weights and two moments, whole.
    assert need["checkpoint"] == 12 * parameters
    assert need["host"] == need["trees"] + need["checkpoint"]

    offloaded = memory_of(qwen, flags, world_size=4, offload=True)
    assert offloaded["host"] - need["host"] == 16 * parameters / 4
    assert need["rollouts"] - offloaded["rollouts"] == 12 * parameters / 4

    # Two replicas of two ranks: each rank keeps a half, and its problems stay a quarter.
    replicated = memory_of(qwen, flags + " --replicas 2", world_size=4)
    assert replicated["moments"] == 8 * parameters / 2
    assert replicated["trees"] == need["trees"]

    # All that is left to train is the last norm and the value head.
    frozen = memory.outline(str(QWEN), freeze_blocks=36)
    assert memory_of(frozen, flags)["gradients"] == 4 * (2048 + head)

    with_base = memory_of(qwen, flags + " --loss apo", world_size=4)
    assert with_base["weights"] == 2 * need["weights"]
    assert with_base["gradients"] == need["gradients"]


def test_memory_of_the_update_by_hand(qwen):
    """Guards against the head's float32 copies and the blocks' gradients left out: they were."""
    need = memory_of(qwen, "--micro-batch 3 --max-new-tokens 50 --mixed-precision bf16")
    # 36 blocks and one at work, 1000 bytes a token each; ten float32 numbers a hidden one.
    assert need["activations"] == 3 * 150 * (37 * 1000 + 40 * 2048) + 20 * 2**24
    block = 2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008 + 2 * 2048
    root = 151936 * 2048 + 2048 + 2048 * 2048 + 2048 + 2 * 2048 + 2
    # Weights and gradients in bf16, sums in float32, of two blocks and the root.
    gathered = (2 + 2 + 4) * (root + 2 * block)
    kept = need["weights"] + need["moments"] + need["gradients"]
    assert need["update"] == kept + gathered + need["activations"]


def test_memory_of_the_cache_is_what_the_search_takes():
    """The tables that a search really makes, with every bound reached."""
    flags = """
        --rollouts-per-problem 30 --max-nodes 60 --max-new-tokens 20 --cover 1 --width 1
        --problems-per-iteration 9
    """.split()
    config, _, _ = train.parse_arguments(flags)
    model, tokenizer = policy.load_policy(config.model)
    problems = data.eval_problems(9, "2", "terse")
    prompts = evaluation.encode_prompts(tokenizer, problems)
    expander = astar_search.Expander(model, prompts, 20)
    options = astar_search.Options(
        eos=policy.stop_tokens(model, tokenizer), K=200, max_new_tokens=20, max_nodes=60
    )
    astar_search.search(astar_search.root_keys(0, 1, range(9)), expander, options)
    tables = expander.cache.tables.values()
    found = sum(table.numel() * table.element_size() for table in tables)
    need = memory.memory(
        config,
        memory.outline(config.model),
        prompt=len(prompts[0]),
        activations=1000.0,
        world_size=1,
        offload=False,
    )
    assert found == need["K/V"]


class LinearAndGelu(torch.nn.Module):
    """A block that keeps its input, and the input of its GELU."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, hidden_states, **kwargs):
        return torch.nn.functional.gelu(self.linear(hidden_states))


@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_counted_and_not_guessed(dtype, width):
    """2 tensors of D = 16 numbers a token, of 4 bytes or, in bf16, of 2."""
    model = memory.outline(str(ROOT / "tiny_base"))
    blocks = [LinearAndGelu() for _ in range(4)]
    model.base_model.layers = torch.nn.ModuleList(blocks).to("meta")
    model.base_model.embed_tokens = torch.nn.Embedding(24, 16, device="meta")
    model.base_model.norm = torch.nn.Identity()
    assert memory.activation_bytes(model, dtype) == 2 * width * 16


# -------------------------------------------------------------------------------------- The command


def refused(capsys, *flags):
    """The one sentence on stderr, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        memory.main([str(word) for word in flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_the_command_prints_and_refuses(capsys, tmp_path, monkeypatch):
    """Of a config alone, without weights or network; what it prints as fitting is let through."""
    monkeypatch.chdir(tmp_path)
    flags = ["--config", "training", "--model", str(QWEN)]
    memory.main(flags)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("3,085,938,688 parameters, 36 blocks")
    head, *table = [line.split() for line in lines[-9:]]
    expected = [[ranks, offload] for offload in ("off", "on") for ranks in "1248"]
    assert [row[:2] for row in table] == expected
    peak = max(float(table[0][head.index(name)]) for name in ("rollouts", "update"))

    memory.main([*flags, "--gpu-memory", str(peak + 0.1)])
    assert "it fits on 2 ranks" in refused(capsys, *flags, "--gpu-memory", peak - 0.1)
    # The preset as the README has it: of one GPU of 80 GiB, and not of 24.
    memory.main([*flags, "--gpu-memory", "80"])
    assert "--gpu-memory 24" in refused(capsys, *flags, "--gpu-memory", 24)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--gpu-memory 0.01", "--micro-batch"),
        ("--gpu-memory nan", "above 0"),
        ("--gpu-memory -1", "above 0"),
        ("--gpu-memory much", "much"),
        ("--model nothing", "nothing"),
        ("--freeze-blocks 9", "--freeze-blocks"),
        ("--max-new-tokens 300", "context"),
        ("--beta 0", "--beta"),
        ("--eval-only --checkpoint runs", "runs"),
    ],
)
def test_bad_flags_are_refused(flags, word, capsys):
    assert word in refused(capsys, *flags.split())
