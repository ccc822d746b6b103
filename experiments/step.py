"""The credit and the update of train.py's loop as functions, for scripts that measure them.

    python experiments/step.py     # is the copy true?  One iteration of each loss, against train.py

train.main() holds these lines inline, because there they are read in order.  speed.py and
gradient_noise.py need them alone, on one process.  The check asserts that both compute the same
numbers, so a change of the loop that is not made here too is found.
"""

import copy
import pathlib
import sys
import tempfile

import torch
from torch.nn.utils import clip_grad_norm_

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import eval as evaluation
import fsdp
import policy
import train
import value as value_module


def columns_of(rollouts, verdicts, reward, config):
    """What the losses need of each leaf: rewards, soft_targets, leaf_weight, advantages, ...."""
    rewards = torch.tensor([verdict["reward"] for verdict in verdicts])
    correct = torch.tensor([verdict["correct"] for verdict in verdicts], dtype=torch.bool)
    leaf_weight = train.leaf_weights(rollouts, config)
    soft_targets = value_module.soft_target(rewards, *reward.bounds, config.beta)
    if config.loss == "em":
        advantage = policy.em_advantages(soft_targets, leaf_weight, rollouts.problem, correct)
        advantages = advantage[:, None] * rollouts.mask
    elif config.loss == "grpo":
        advantage = policy.grpo_advantages(rewards, leaf_weight, rollouts.problem)
        advantages = advantage[:, None] * rollouts.mask
    else:
        advantages = value_module.gae(rewards, rollouts.values, rollouts.mask, config.gae_lambda)
    return {
        "rewards": rewards,
        "soft_targets": soft_targets,
        "leaf_weight": leaf_weight,
        "advantages": advantages,
        "teaches": train.which_teach(leaf_weight, advantages, config),
    }


def first_rollouts(model, tokenizer, config, reward, value_function=None):
    """(rollouts, verdicts, indices) of iteration 1, as train.py makes them, on one process."""
    ranks = fsdp.Ranks(rank=0, world_size=1, device=torch.device("cpu"))
    problems, indices = train.draw_problems(config, 1, ranks, None)
    rollouts = train.generate_rollouts(
        model,
        tokenizer,
        problems,
        indices,
        config,
        reward,
        iteration=1,
        value_function=value_function,
        kind=config.rollout,
        K=config.rollouts_per_problem,
    )
    _, verdicts = evaluation.judge_rollouts(
        rollouts, tokenizer, problems, reward, config.max_new_tokens, config.stop
    )
    return rollouts, verdicts, indices


def policy_loss_of(model, part, config, totals):
    """(policy loss, metrics) of one micro-batch: terms of sums over the minibatch.  Not for apo."""
    log_prob, entropy = policy.score(model, part.tokens, part.mask)
    weight = part.extra["leaf_weight"][:, None] * part.mask
    policy_loss, metrics = policy.ppo_loss(
        log_prob=log_prob,
        old_log_prob=part.log_probs,
        advantages=part.extra["advantages"],
        entropy=entropy,
        token_weights=weight / totals["tokens"],
        clip=config.clip,
        entropy_coef=config.entropy_coef,
    )
    metrics |= policy.ratio_metrics(
        log_prob=log_prob,
        old_log_prob=part.log_probs,
        entropy=entropy,
        token_weights=weight / totals["teaching_tokens"],
        clip=config.clip,
    )
    return policy_loss, metrics


def update(model, head, optimizer, rollouts, indices, config, iteration, ranks):
    """All optimiser steps of one iteration.  Returns the metrics of each."""
    for group in optimizer.param_groups:
        group["lr"] = train.learning_rate_scale(config, iteration) * group["peak"]
    policy_parameters = [p for p in model.parameters() if p.requires_grad]
    head_parameters = list(head.parameters())
    steps = []
    model.train(config.gradient_checkpointing == "on")
    for epoch in range(config.epochs):
        for rows in train.deal_minibatches(rollouts, indices, config, iteration, epoch):
            totals = train.minibatch_totals(rollouts, rows, ranks)
            if totals["tokens"] == 0:
                continue
            sums = {}
            teaching = rows[rollouts.extra["teaches"][rows]]
            for part in train.parts_of(rollouts, teaching, config, ranks):
                loss, metrics = policy_loss_of(model, part, config, totals)
                loss.backward()
                train.add_up(sums, metrics)
            for part in train.parts_of(rollouts, rows, config, ranks):
                loss, metrics = train.head_loss(head, part, totals)
                loss.backward()
                train.add_up(sums, metrics)
            measured = train.reduce_metrics(sums, ranks)
            policy_norm = clip_grad_norm_(policy_parameters, config.grad_clip)
            clip_grad_norm_(head_parameters, config.grad_clip)
            measured["grad_norm"] = policy_norm.item()
            train.check_finite(measured, iteration)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.append(measured)
    model.eval()
    return steps


# -------------------------------------------------------------------------------------------- Check


class Recorder:
    """Keeps what train.main() has before its first update, and the metrics of its steps."""

    def __init__(self):
        self.run = None
        self.model = None  # as they were before the update
        self.head = None
        self.verdicts = None
        self.rollouts = None
        self.indices = None
        self.steps = None
        self.set_up = train.set_up
        self.judge_rollouts = evaluation.judge_rollouts
        self.deal_minibatches = train.deal_minibatches
        self.mean_metrics = train.mean_metrics

    def __enter__(self):
        train.set_up = self.watch_set_up
        evaluation.judge_rollouts = self.watch_judge_rollouts
        train.deal_minibatches = self.watch_deal_minibatches
        train.mean_metrics = self.watch_mean_metrics
        return self

    def __exit__(self, *exception):
        train.set_up = self.set_up
        evaluation.judge_rollouts = self.judge_rollouts
        train.deal_minibatches = self.deal_minibatches
        train.mean_metrics = self.mean_metrics

    def watch_set_up(self, config, arguments):
        self.run = self.set_up(config, arguments)
        return self.run

    def watch_judge_rollouts(self, *args):
        texts, verdicts = self.judge_rollouts(*args)
        if self.rollouts is None:  # the last call before the update judges its rollouts
            self.verdicts = verdicts
        return texts, verdicts

    def watch_deal_minibatches(self, rollouts, indices, config, iteration, epoch):
        if self.rollouts is None:
            self.rollouts = rollouts
            self.indices = indices
            self.model = copy.deepcopy(self.run.model)
            self.head = copy.deepcopy(self.run.head)
        return self.deal_minibatches(rollouts, indices, config, iteration, epoch)

    def watch_mean_metrics(self, steps):
        self.steps = steps
        return self.mean_metrics(steps)


def check(flags):
    """Assert that one iteration of train.py and its copy here give the same numbers."""
    with tempfile.TemporaryDirectory() as folder, Recorder() as recorder:
        common = "--iterations 1 --problems-per-iteration 32 --eval-problems 4 --device cpu"
        train.main(f"{flags} {common} --output-dir {folder}".split())
    run = recorder.run
    columns = columns_of(recorder.rollouts, recorder.verdicts, run.reward, run.config)
    for name, column in columns.items():
        assert torch.equal(column, recorder.rollouts.extra[name]), name
    steps = update(
        recorder.model,
        recorder.head,
        train.make_optimizer(recorder.model, recorder.head, run.config),
        recorder.rollouts,
        recorder.indices,
        run.config,
        iteration=1,
        ranks=run.ranks,
    )
    assert steps == recorder.steps, (steps, recorder.steps)
    for mine, theirs in zip(recorder.model.parameters(), run.model.parameters()):
        assert torch.equal(mine, theirs)
    print(f"{flags}: {len(steps)} steps, all columns, metrics and weights are the same\n")


def main():
    for loss in ("em", "grpo", "ppo"):
        check(f"--loss {loss}")


if __name__ == "__main__":
    main()
