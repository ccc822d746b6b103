r"""rounds.py -- what --width buys: rounds (forwards) of a search, its model tokens and seconds.

    python experiments/rounds.py after                           # the tiny base: three minutes
    python experiments/rounds.py after --model runs/quick/checkpoint_iter_40
    python experiments/rounds.py after --model examples/qwen2.5-3b --config-only   # random weights
    python experiments/rounds.py after --model runs/smollm2 --train-file runs/smollm2/train.jsonl \
        --reward experiments/real_model_reward.py:reward --stop '\n' --max-new-tokens 8
    python experiments/rounds.py round                           # seconds a round of 135M, by nodes

Two searches, as the presets make them: `quick` (tau 0, until a leaf is right) and `ppo` (tau 1).
64 problems in lock-step, the first of seed 0; the widths in turn, in CPU seconds of one thread, the
least of the repeats.  A row a figure is added to experiments/results/rounds.jsonl, `before` and
`after` in turn; the least seconds of the rows of one setting count:

rounds: forwards of the batch, the most that any of its problems needs.  rounds_alone: the mean over
the problems, each searched by itself.  nodes_a_round: model tokens but for the prompts, a forward.
seconds_alone: a problem by itself, the mean over the first `--alone` of them.  cpu_of_the_host: the
share of the seconds in next_to_evaluate and pop_evaluated_nodes.
"""

import argparse
import gc
import math
import os
import pathlib
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "examples")]

import compare
import memory_measured

import astar_search
import data
import eval as evaluation
import policy
import reward as reward_module
import train

WIDTHS = (1, 2, 4, 8, 16)
PRESETS = ("quick", "ppo")
PROMPT = 6  # tokens of a random prompt, such as 34*12=


class TimedTree(astar_search.Tree):
    """A search that counts its rounds and the CPU seconds of all heaps."""

    seconds = 0.0

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.rounds = 0

    def next_to_evaluate(self):
        start = time.process_time()
        self.rounds += 1
        nodes = super().next_to_evaluate()
        TimedTree.seconds += time.process_time() - start
        return nodes

    def pop_evaluated_nodes(self):
        start = time.process_time()
        super().pop_evaluated_nodes()
        TimedTree.seconds += time.process_time() - start


class Task:
    """A model and its problems: search(preset, width, rows) -> (trees, expander, CPU seconds)."""

    def __init__(self, args):
        self.value_function = None
        if args.config_only:
            torch.manual_seed(0)
            model_config = AutoConfig.from_pretrained(args.model)
            self.model = AutoModelForCausalLM.from_config(model_config).eval()
            vocabulary = model_config.get_text_config().vocab_size
            self.prompts = random_prompts(vocabulary, args.problems)
            self.eos = ()
        else:
            self.model, self.tokenizer = policy.load_policy(args.model)
            self.value_function = evaluation.load_value_function(args.model, self.model)
            self.reward = reward_module.load_reward(args.reward)
            if args.train_file:
                self.problems = data.read_problems(args.train_file)[: args.problems]
            else:
                self.problems = []
                for i in range(args.problems):
                    self.problems.append(data.train_problem(0, 1, i, args.digits, "terse"))
            self.prompts = evaluation.encode_prompts(self.tokenizer, self.problems)
            self.eos = policy.stop_tokens(self.model, self.tokenizer)
        self.stop = evaluation.stop_texts(args.stop)
        self.config_only = args.config_only
        self.max_new_tokens = args.max_new_tokens
        self.model.requires_grad_(False)

    def search(self, preset, width, rows):
        config = train.Config(**train.PRESETS[preset])
        prompts = [self.prompts[row] for row in rows]
        until, stop = None, None
        if not self.config_only:
            stop = astar_search.StopTexts(self.tokenizer, self.stop, prompts)
        if config.until_right == "on" and not self.config_only:
            until = evaluation.right_leaf_test(
                self.tokenizer,
                [self.problems[row] for row in rows],
                prompts,
                self.reward,
                self.max_new_tokens,
                self.stop,
            )
        options = astar_search.Options(
            eos=self.eos,
            stop=stop,
            K=config.rollouts_per_problem,
            tau=config.tau,
            width=width,
            max_new_tokens=self.max_new_tokens,
            max_nodes=config.max_nodes,
            max_open=config.max_open,
            cover=config.cover if config.cover < 1 else math.inf,
            until=until,
        )
        start = time.process_time()
        expander = astar_search.Expander(
            self.model, prompts, self.max_new_tokens, self.value_function
        )
        keys = astar_search.root_keys(0, 1, rows)
        trees = astar_search.search(keys, expander, options, TimedTree)
        return trees, expander, time.process_time() - start


def random_prompts(vocabulary, n):
    """n prompts of random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (n, PROMPT), generator=generator).tolist()


def measure(task, preset, args):
    """Figures of each width, the widths in turn: {width: dict}."""
    rows = range(len(task.prompts))
    figures = {}
    for repeat in range(args.repeats + 1):  # the first is not measured
        for width in args.widths:
            gc.collect()
            TimedTree.seconds = 0.0
            trees, expander, seconds = task.search(preset, width, rows)
            figure = figures.setdefault(width, {"seconds": math.inf, "seconds_alone": math.inf})
            if repeat > 0 and seconds < figure["seconds"]:
                figure["seconds"] = seconds
                figure["cpu_of_the_host"] = TimedTree.seconds / seconds
            alone = [task.search(preset, width, [row])[2] for row in rows[: args.alone]]
            if alone and repeat > 0:
                figure["seconds_alone"] = min(figure["seconds_alone"], sum(alone) / len(alone))
            nodes = sum(expander.spent) - sum(len(prompt) for prompt in expander.prompts)
            figure["rounds"] = expander.forwards
            figure["rounds_alone"] = sum(tree.rounds for tree in trees) / len(trees)
            figure["nodes_a_round"] = nodes / expander.forwards
            figure["model_tokens"] = sum(expander.spent)
            figure["pops"] = sum(tree.pops for tree in trees)
            figure["leaves"] = sum(len(tree.leaves) for tree in trees)
    return figures


@torch.no_grad()
def seconds_a_round(args):
    """Rows: CPU seconds of a forward of the 135M shape on n nodes of each of 8 problems.

    The nodes lie 16 to 24 tokens deep, each on a chain of its own below the prompt.
    """
    torch.manual_seed(0)
    config = Qwen2Config(**memory_measured.SIZES, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config).eval()
    problems = 8
    times = {}
    for repeat in range(args.repeats + 1):
        for n in (1, 2, 4, 8):
            prompts = random_prompts(config.vocab_size, problems)
            expander = astar_search.Expander(model, prompts, 48)
            roots = [astar_search.Node(i, None, token=-1, depth=0, f=0.0) for i in range(problems)]
            expander(roots)
            chains = [root for root in roots for _ in range(n)]
            for depth in range(1, 4):
                chains = [astar_search.Node(c.problem, c, 7 * depth, depth, 0.0) for c in chains]
                start = time.process_time()
                expander(chains)
                seconds = time.process_time() - start
                if repeat > 0:
                    times[n] = min(times.get(n, math.inf), seconds)
    for n, seconds in times.items():
        yield {"nodes": n * problems, "seconds_a_round": seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("label", help="before, after, ... (of a change); or `round`")
    parser.add_argument("--model", default=str(ROOT / "tiny_base"))
    parser.add_argument("--name", help="the model's name in the rows; its folder's by default")
    parser.add_argument("--config-only", action="store_true", help="random weights in its shape")
    parser.add_argument("--presets", nargs="*", default=PRESETS, choices=PRESETS)
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--digits", default="2")
    parser.add_argument("--train-file", help="problems of a file, as in train.py")
    parser.add_argument("--reward", default="", help="as in train.py")
    parser.add_argument("--stop", action="append", default=[], help="as in train.py")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4, help="problems searched by themselves")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = {"cpu": compare.cpu(), "threads": 1, "torch": torch.__version__}
    if args.label == "round":
        for row in seconds_a_round(args):
            print(row, flush=True)
            compare.write("rounds", {"label": "round", "model": "135M", **row, **where})
        return
    name = args.name or os.path.basename(os.path.normpath(args.model))
    task = Task(args)
    gc.freeze()
    for preset in args.presets:
        for width, figure in measure(task, preset, args).items():
            row = {"label": args.label, "model": name, "preset": preset, "width": width}
            figure = {key: round(x, 4) for key, x in figure.items() if x < math.inf}
            print(row | figure, flush=True)
            compare.write("rounds", row | {"problems": args.problems} | figure | where)


if __name__ == "__main__":
    main()
