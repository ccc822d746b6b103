"""The outside baseline: TRL's GRPOTrainer on the same base, reward, problems and cores.

    python -m venv trl && trl/bin/pip install -r experiments/requirements.txt
    trl/bin/python experiments/trl_grpo.py --learning-rate 2e-4 --seed 0
    trl/bin/python experiments/trl_grpo.py --digits 2-3 --model tiny_base/task --max-new-tokens 96

256 completions a batch (32 problems x 8), no KL term, clip .2; TRL's own defaults otherwise.  Every
16 batches the greedy accuracy on the same 500 held-out problems; ends at 80 %.  Appends a row to
experiments/results/trl.jsonl.  Its `seconds` leave the evaluations out (compare.py's do not), its
`model_tokens` count each prompt once a problem.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compare
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module

COMPLETIONS = 8  # of a problem


class TokenCountingReward:
    """The same reward, and a count of model tokens: a prompt once a problem, each completion."""

    __name__ = "reward"  # TRL logs it under this name

    def __init__(self, reward, eos, max_new_tokens):
        self.reward = reward
        self.eos = eos
        self.max_new_tokens = max_new_tokens
        self.tokens = 0

    def __call__(self, prompts, completions, completion_ids, truth, **_):
        """Rewards of a batch, as GRPOTrainer asks for them."""
        self.tokens += sum(len(ids) for ids in completion_ids)
        self.tokens += sum(len(prompt) for prompt in prompts) // COMPLETIONS
        rewards = []
        for text, answer, ids in zip(completions, truth, completion_ids):
            truncated = self.eos not in ids
            verdict = self.reward(text, answer, len(ids) / self.max_new_tokens, truncated)
            rewards.append(verdict["reward"])
        return rewards


class Watch(TrainerCallback):
    """Evaluates every 16 batches, and stops at the target or when the time is over."""

    def __init__(self, model, tokenizer, reward, args):
        self.model = model
        self.tokenizer = tokenizer
        self.reward = reward
        self.args = args
        self.problems = data.eval_problems(500, args.digits, "terse")
        self.curve = []
        self.start = time.process_time()
        self.evaluation_seconds = 0.0

    def measure(self, step):
        """A point more of the curve."""
        start = time.process_time()
        ranks = fsdp.Ranks(0, 1, torch.device("cpu"))
        was_training = self.model.training
        self.model.eval()
        result, _ = evaluation.evaluate(
            self.model,
            self.tokenizer,
            self.problems,
            self.reward.reward,
            ranks,
            max_new_tokens=self.args.max_new_tokens,
        )
        self.model.train(was_training)
        self.evaluation_seconds += time.process_time() - start
        seconds = time.process_time() - self.start - self.evaluation_seconds
        point = {
            "iteration": step,
            "seconds": seconds,
            "model_tokens": self.reward.tokens,
            "eval_accuracy": result["accuracy"],
            "unique_correct": 0.0,
        }
        self.curve.append(point)
        print(point, flush=True)

    def on_step_end(self, _, state, control, **__):
        """Called by the trainer after every batch."""
        if state.global_step % 16 == 0:
            self.measure(state.global_step)
            last = self.curve[-1]
            late = last["seconds"] > self.args.seconds
            if last["eval_accuracy"] >= self.args.target or late:
                control.should_training_stop = True


def make_config(args, folder):
    """What GRPOTrainer is told."""
    return GRPOConfig(
        output_dir=folder,
        learning_rate=args.learning_rate,
        seed=args.seed,
        max_steps=args.max_steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=args.problems * COMPLETIONS,
        num_generations=COMPLETIONS,
        max_completion_length=args.max_new_tokens,
        beta=0.0,
        epsilon=0.2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "tiny_base"))
    parser.add_argument("--digits", default="2", help="of the operands")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=32, help="a batch")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--max-steps", type=int, default=2000)
    args = parser.parse_args()

    model, tokenizer = policy.load_policy(args.model)
    reward = TokenCountingReward(
        reward_module.Reward(), tokenizer.eos_token_id, args.max_new_tokens
    )
    examples = []
    for i in range(20000):
        problem = data.train_problem(args.seed, 0, i, args.digits, "terse")
        examples.append({"prompt": problem.prompt, "truth": problem.answer})
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(model, tokenizer, reward, args)
        trainer = GRPOTrainer(
            model,
            reward,
            args=make_config(args, folder),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        watch.start = time.process_time()
        watch.measure(0)
        trainer.train()
    row = {
        "setting": f"TRL GRPO; lr {args.learning_rate:g}",
        "seed": args.seed,
        "digits": args.digits,
        "flags": f"--problems-per-iteration {args.problems}",
        "cpu": compare.cpu(),
        "threads": torch.get_num_threads(),
        "cpu_seconds": watch.curve[-1]["seconds"],
        "curve": watch.curve,
    }
    compare.write("trl", row)


if __name__ == "__main__":
    main()
