"""The outside baseline: TRL's GRPOTrainer on the same base, reward, problems and cores.

    python -m venv trl && trl/bin/pip install -r experiments/requirements.txt
    trl/bin/python experiments/trl_grpo.py --learning-rate 2e-4 --seed 0

256 completions a batch (32 problems x 8), no KL term, clip .2: TRL's own defaults otherwise.  Every 16 batches greedy
accuracy on the same 500 held-out problems; ends at 80 %.  Appends a row to experiments/results/trl.jsonl that report.py
reads: `seconds` leaves the evaluations out (compare.py's do not), `model_tokens` counts each prompt once a problem.
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

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

import compare  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import fsdp  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny_base"))
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=32, help="a batch")
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()

    model, tokenizer = policy.load_policy(args.model)
    reward, held_out = reward_module.Reward(), data.eval_problems(500, "2", "terse")
    problems = [data.train_problem(args.seed, 0, i, "2", "terse") for i in range(20000)]
    dataset = Dataset.from_list([{"prompt": p.prompt, "truth": p.answer} for p in problems])
    spent, curve, clock = {"tokens": 0, "evaluation": 0.0}, [], {}

    def score(prompts, completions, completion_ids, truth, **_):
        """The same reward; and the count of model tokens: a prompt once a problem, each completion in full."""
        spent["tokens"] += sum(map(len, completion_ids)) + sum(len(p) for p in prompts) // 8
        eos = tokenizer.eos_token_id
        return [
            reward(text, answer, len(ids) / 48, eos not in ids)["reward"]
            for text, answer, ids in zip(completions, truth, completion_ids)
        ]

    class Watch(TrainerCallback):
        def measure(self, step, control=None):
            start = time.process_time()
            result, _ = evaluation.evaluate(model, tokenizer, held_out, reward, fsdp.Ranks(0, 1, torch.device("cpu")))
            spent["evaluation"] += time.process_time() - start
            seconds = time.process_time() - clock["start"] - spent["evaluation"]
            curve.append(
                {
                    "iteration": step,
                    "seconds": seconds,
                    "model_tokens": spent["tokens"],
                    "eval_accuracy": result["accuracy"],
                    "unique_correct": 0.0,
                }
            )
            print(curve[-1], flush=True)
            if control and (result["accuracy"] >= args.target or seconds > args.seconds):
                control.should_training_stop = True

        def on_step_end(self, _, state, control, **__):
            if state.global_step % 16 == 0:
                self.measure(state.global_step, control)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, learning_rate=args.learning_rate, seed=args.seed, max_steps=2000, lr_scheduler_type="constant",
            per_device_train_batch_size=args.problems * 8, num_generations=8, max_completion_length=48, beta=0.0, epsilon=0.2,
            use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, score, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[watch := Watch()]
        )
        clock["start"] = time.process_time()
        watch.measure(0)
        trainer.train()
    row = {"setting": f"TRL GRPO; lr {args.learning_rate:g}", "seed": args.seed, "flags": f"--problems-per-iteration {args.problems}",
           "cpu": compare.cpu(), "threads": torch.get_num_threads(), "cpu_seconds": curve[-1]["seconds"], "curve": curve}  # fmt: skip
    compare.write("trl", row)


if __name__ == "__main__":
    main()
