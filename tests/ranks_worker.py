"""Three runs of train.py on however many ranks start this, two of them in float64.

    torchrun --standalone --nproc_per_node=2 tests/ranks_worker.py OUT FLAGS OF THE THIRD RUN

test_fsdp.py starts it.  The float64 runs are one optimiser step each, on 7 problems and on 2.  Each
writes OUT/W_PROBLEMS.json (W ranks; the token ids of the leaves of every problem, and the metrics)
and OUT/W_PROBLEMS.safetensors (the gradients).  In float64 what the ranks may differ by, rounding,
is far below what a wrong gradient would show.  The third run is train.py as it is.  They share one
start, because starting torch on W ranks costs seconds.
"""

import json
import os
import sys
import time
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import fsdp
import policy
import train

FLAGS = """
    --config ppo --rollouts-per-problem 3 --max-new-tokens 12 --micro-batch 4 --minibatches 1
    --grad-clip 1e9 --iterations 1 --eval-problems 5 --device cpu
""".split()

load_policy = policy.load_policy
load_head = train.load_head
generate_rollouts = train.generate_rollouts
found = {}  # global problem number -> token ids of its leaves; of this rank's problems


def load_policy_in_float64(name, dtype=None, **options):
    return load_policy(name, dtype=torch.float64, **options)


def load_noisy_head_in_float64(config, source, model):
    """A head that steers the search by noise: it must not be another on another rank or batch."""
    head = load_head(config, source, model).double()
    torch.nn.init.normal_(head.outer.weight)
    return head


class LetterReward:
    """+1 or -1 by the letters of a completion.

    The real reward is the lowest for nearly all completions so early, and would teach nothing.
    """

    bounds = (-1.0, 1.1)

    def judge(self, problem, completion, length_fraction=0.0, truncated=False):
        right = sum(completion.encode()) % 3 == 0
        reward = 1.0 if right else -1.0
        return {"reward": reward, "correct": right, "formatted": True, "answer": completion}


def load_letter_reward(*flags):
    return LetterReward()


def generate_and_keep_rollouts(model, tokenizer, problems, indices, *others, **options):
    rollouts = generate_rollouts(model, tokenizer, problems, indices, *others, **options)
    if options.get("stream", 0) == 0:  # the others are not trained on
        for p, ids in zip(rollouts.problem.tolist(), rollouts.completions()):
            found.setdefault(indices[p], []).append(ids)
    return rollouts


def stay(ranks, status=0):
    """Instead of fsdp.shutdown: the next run needs the ranks too."""
    assert status == 0


def first_gradients(folder):
    """The gradients of a run of one optimiser step: Adam's first moment is then (1 - beta1) g."""
    gradients = {}
    for name, moment in load_file(f"{folder}/checkpoint_iter_1/optimizer.safetensors").items():
        if name.endswith(".exp_avg"):
            assert moment.dtype == torch.float64, name
            gradients[name] = moment / (1 - 0.9)
    return gradients


def first_metrics(folder):
    """The row of the first iteration, without what depends on the ranks by design."""
    with open(f"{folder}/metrics.jsonl") as file:
        row = json.loads(file.readlines()[1])
    del row["seconds"]
    del row["forwards"]  # of all ranks together: each runs its own
    return row


def run_in_float64(out, problems, ranks):
    """One iteration of train.py on so many problems, in float64; writes OUT/W_PROBLEMS.*"""
    name = f"{out}/{ranks.world_size}_{problems}"
    folder = f"{name}_run"
    flags = [*FLAGS, "--problems-per-iteration", str(problems), "--output-dir", folder]
    if ranks.world_size > 1:
        flags.append("--distributed")
    found.clear()
    with (
        mock.patch.object(policy, "load_policy", load_policy_in_float64),
        mock.patch.object(train, "load_head", load_noisy_head_in_float64),
        mock.patch.object(train.reward_module, "load_reward", load_letter_reward),
        mock.patch.object(train, "generate_rollouts", generate_and_keep_rollouts),
        mock.patch.object(fsdp, "shutdown", stay),
    ):
        train.main(flags)
    leaves = {}
    for rank_leaves in fsdp.all_gather(list(found.items()), ranks):
        leaves.update(rank_leaves)
    if ranks.is_main:
        leaves = [leaves[p] for p in sorted(leaves)]
        with open(f"{name}.json", "w") as file:
            json.dump({"leaves": leaves, "metrics": first_metrics(folder)}, file)
        save_file(first_gradients(folder), f"{name}.safetensors")


def failure_of(where, *arguments):
    """The sentence of the ValueError that where(...) raises."""
    try:
        where(*arguments)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def check_collectives(ranks):
    """Every rank learns all values and every failure, whichever rank has it."""
    W = ranks.world_size
    last = W - 1

    def fail():
        raise ValueError("no")

    def fail_on_last():
        if ranks.rank == last:
            fail()

    def own_rank():
        return ranks.rank

    longer = "x" * 100 * ranks.rank  # texts of unequal length
    assert fsdp.all_gather(longer, ranks) == ["x" * 100 * rank for rank in range(W)]
    # 1 + 2 + ... + W, and a key that the last rank alone has
    sums = {"n": ranks.rank + 1}
    if ranks.rank == last:
        sums["last"] = 2.5
    assert fsdp.all_reduce_sum(sums, ranks) == {"n": W * (W + 1) // 2, "last": 2.5}

    assert fsdp.raise_everywhere(own_rank, ranks) == ranks.rank
    assert fsdp.on_main(own_rank, ranks) == (0 if ranks.is_main else None)
    assert failure_of(fsdp.raise_everywhere, fail, ranks) == "no"
    expected = "no" if W == 1 else f"rank {last}: no"
    assert failure_of(fsdp.raise_everywhere, fail_on_last, ranks) == expected
    expected = "no" if W == 1 else "rank 0: no"
    assert failure_of(fsdp.on_main, fail, ranks) == expected


def check_turns(out, ranks):
    """in_turn: no two ranks of a node are inside at once, and a failure is everyone's."""
    W = ranks.world_size
    inside = f"{out}/{W}_inside"

    def be_alone():
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # FileExistsError if another one is in
        time.sleep(0.05)
        os.remove(inside)
        return ranks.rank

    def fail_on_last():
        if ranks.rank == W - 1:
            raise ValueError("no")

    assert fsdp.in_turn(be_alone, ranks) == ranks.rank
    assert failure_of(fsdp.in_turn, fail_on_last, ranks) == (
        "no" if W == 1 else f"rank {W - 1}: no"
    )


def check_groups(ranks):
    """Each group of ranks waits LONGEST_WAIT, also those of replicas."""
    W = ranks.world_size
    if W == 1:
        return  # started without torchrun: there are no groups
    replicated = fsdp.make_mesh(ranks.group, ranks.device, replicas=W)
    assert replicated.shape == (W, 1)
    replicas, shards = replicated.get_all_groups()
    assert (replicas.size(), shards.size()) == (W, 1)
    for group in (ranks.group, ranks.mesh.get_group(), replicas, shards):
        assert group._get_backend(ranks.device).options._timeout == fsdp.LONGEST_WAIT


def check_start(ranks):
    """Nodes have command lines of their own: another seed is refused, another path is not."""
    inputs = {"--train-file": "the checksum", "--eval-file": "another"}
    config = train.Config(train_file=f"node{ranks.rank}.jsonl", eval_file=f"{ranks.rank}.jsonl")
    train.check_same_start(config, inputs, ranks)
    failure = failure_of(train.check_same_start, train.Config(seed=ranks.rank), {}, ranks)
    expected = "rank 1: --seed is not that of rank 0: start all nodes alike"
    assert failure == (expected if ranks.world_size > 1 else "nothing was raised")


def main():
    out, *flags = sys.argv[1:]
    ranks = fsdp.init_ranks("WORLD_SIZE" in os.environ, "cpu")
    check_collectives(ranks)
    check_turns(out, ranks)
    check_groups(ranks)
    check_start(ranks)
    run_in_float64(out, 7, ranks)
    run_in_float64(out, 2, ranks)
    train.main(flags)  # ends with fsdp.shutdown


if __name__ == "__main__":
    main()
