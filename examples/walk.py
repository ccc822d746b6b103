"""The walk: one problem, from the search to the policy after one update, in numbers small enough for paper.

    python experiments/walk.py

Three letters, at most two of them, and a policy that is a table.  Every number stands beside its equation, and but
for the dice only numbers printed above it go into it: each can be recomputed with a pocket calculator.  (Computed in
float64 and rounded to three decimals for print: your last digit may differ by one or two.)  The functions are the ones
that train.py calls; what a model would be asked, the table answers.
"""

import dataclasses
import math
import pathlib
import sys
from types import SimpleNamespace

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402
import value  # noqa: E402

LETTERS, B, END, PROMPT = "ab.x", 1, 2, 3
PREFIXES = ("x", "xa", "xb")  # rows of the table: the prompt, and what may follow it without being finished
PI = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
V = torch.tensor([-0.4, -0.9, 0.5], dtype=torch.float64)  # what a value head might say of each prefix
U = torch.tensor([0.25, 0.05, 0.7], dtype=torch.float64)
BETA, TAU, LAMBDA, CLIP, RATE, K = 1.0, 1.0, 0.5, 0.2, 2.0, 3


def name(node):
    """The prefix or completion of a node, after the prompt: x, xb, xb. for example."""
    return "x" + "".join(LETTERS[token] for token in node.path())


def numbers(*xs):
    """Three decimals each, without a minus before a zero."""
    return " ".join(f"{round(float(x), 3) + 0.0:8.3f}" for x in xs)


def table(head, rows):
    """A line of headings, then a line (name, numbers) a row."""
    print(f"   {head[0]:8s}" + " ".join(f"{word:>8s}" for word in head[1:]))
    for label, *xs in rows:
        print(f"   {label:8s}" + numbers(*xs))


def queued(tree):
    """The queue, largest f first."""
    return "   ".join(f"{name(node)}{numbers(-f)}" for f, node in sorted(tree.queue))


class WatchedTree(astar_search.Tree):
    """The search's own tree, which prints each entry as it leaves the queue: advance() asks `missing` just before."""

    children = {}  # name -> rows of its children, from expand

    def missing(self, node):
        lacking = super().missing(node)
        if not lacking:
            print(f"   queue:   {queued(self)}")
            facts = "".join(f"  {letter}{numbers(x)}" for letter, x in zip("gGhf", (node.g, node.G, node.h, node.f)))
            print(f"   pop {name(node):4s}{facts}{'   a leaf' if node.leaf else ''}")
            if not node.leaf:
                table(("child", "logπ", "g", "Gumbel", "noisy", "G", "h", "f"), WatchedTree.children[name(node)])
        return lacking


def main():
    print("""1  The problem
   Letters a, b and . (the end), at most two of them after the prompt x.  The answer "b." is right.
   π(·|s) = softmax θ(s,·): a table, θ = log π to begin with.   V(s), u(s): the value head's two outputs.
   h(s) = log( u e^(r_hi/β) + (1-u) e^(r_lo/β) ),  r_lo = -1, r_hi = 1, β = 1                        value.soft_value""")
    bounds = reward_module.Reward(format_bonus=0.0).bounds
    h = value.soft_value(torch.logit(U), *bounds, BETA)
    rows = [(s, *row) for s, row in zip(PREFIXES, torch.cat([PI, torch.stack([V, U, h], 1)], 1).tolist())]
    table(("s", "π(a|s)", "π(b|s)", "π(.|s)", "V(s)", "u(s)", "h(s)"), rows)

    # --------------------------------------------------------------------------------------------------- the search
    print("""
2  The search: pop the largest f, push its best child and its next sibling         astar_search.search, Tree.advance
   g(sa) = g(s) + log π(a|s),  h(sa) = h(s) (deferred),  f = (1-τ) g + τ G + h, τ = 1     astar_search.best_children
   G(x) and the Gumbels are dice (a hash of the path); noisy = g + Gumbel, Z = the largest of the siblings' noisy,
   v = G(s) - noisy + log(1 - e^(noisy-Z)),  G(sa) = G(s) - max(0,v) - log(1 + e^(-|v|))             astar_search.perturb""")
    # What collect() asks of a model's expander; slots are rows of the table, 0 is padding.
    known_values = torch.cat([torch.zeros(1), V.float()])
    source = SimpleNamespace(prompts=[[PROMPT]], span=3, values=known_values, spent=[], forwards=0)

    def expand(nodes):
        for node in nodes:  # width 1: one node, the head of the queue
            row = PREFIXES.index(name(node))
            node.slot = row + 1
            keys = astar_search.mix64(torch.tensor(node.key), torch.arange(3))
            log_pi, gumbels = PI[row].log(), astar_search.gumbel(keys)
            g = node.g + log_pi
            G = astar_search.perturb(g[None], keys[None], torch.tensor([[node.G]]))[0]
            columns = torch.stack([log_pi, g, gumbels, g + gumbels, G, h[row].expand(3), G + h[row]], 1).tolist()
            WatchedTree.children[name(node)] = [(name(node) + LETTERS[a], *columns[a]) for a in range(3)]
        rows = [node.slot - 1 for node in nodes]
        return PI[rows].log(), h[rows, None]

    options = astar_search.Options(eos=(END,), K=K, tau=TAU, max_new_tokens=2)
    tree = astar_search.search(astar_search.root_keys(0, 1, [0]), expand, options, WatchedTree)[0]
    kappa = -tree.queue[0][0]
    print(f"   K = {K} leaves: done\n   left on the queue:   {queued(tree)}")

    # ----------------------------------------------------------------------------------- leaf weights and rewards
    print(f"""
3  Leaf weights: κ = {numbers(kappa).strip()}, the best key left behind                         astar_search.log_inclusion
   φ = g + h (without noise),  q = 1 - exp(-exp((φ-κ)/τ)),  weight = π/q, π = e^g;  w = weight / their sum
   (unbiased for a constant h; ours is learned, so they are approximate)                  policy.normalise_weights""")
    rollouts = astar_search.collect([tree], source)
    y = [name(leaf) for leaf in tree.leaves]
    q = [math.exp(astar_search.log_inclusion(leaf.g + leaf.h, kappa, TAU)) for leaf in tree.leaves]
    w = policy.normalise_weights(rollouts.weight.double(), rollouts.problem)
    r = torch.tensor([1.0 if text == "xb." else -1.0 for text in y], dtype=torch.float64)
    facts = [(leaf.g, leaf.h, leaf.g + leaf.h, q[i], leaf.weight, w[i], r[i]) for i, leaf in enumerate(tree.leaves)]
    table(("leaf", "g", "h", "φ", "q", "weight", "w", "r"), [(text, *row) for text, row in zip(y, facts)])

    # --------------------------------------------------------------------------------------------- V, GAE, values
    print("""
4  Advantages: δ_t = r_t + V(s_(t+1)) - V(s_t),  A_t = δ_t + λ A_(t+1),  λ = 0.5                           value.gae
   r_t = 0 but at the last token, where V(s_(t+1)) = 0.   m_t = w / (sum of w over all tokens): the token's weight""")
    mask, values = rollouts.mask, rollouts.values.double()
    advantages = value.gae(r, values, mask, LAMBDA)
    m = w[:, None] * mask
    m = m / m.sum()
    places = mask.nonzero().tolist()  # (leaf, t) of each token
    of_tokens = lambda *columns: [
        (f"{y[i][: t + 1]}→{y[i][t + 1]}", *(x[i, t] if x.ndim == 2 else x[i] for x in columns)) for i, t in places
    ]
    deltas = value.gae(r, values, mask, 0.0)  # λ = 0: A_t = δ_t
    table(("token", "w", "V(s_t)", "δ_t", "A_t", "m_t"), of_tokens(w, values, deltas, advantages, m))
    returns = value.monte_carlo_returns(r, mask)
    targets = value.soft_target(returns, *bounds, BETA)
    at_prefix = torch.zeros_like(mask, dtype=torch.int64)  # row of the table; off the mask it does not matter
    for i, t in places:
        at_prefix[i, t] = PREFIXES.index(y[i][: t + 1])
    _, head = value.value_loss(values, torch.logit(U[at_prefix]), returns, targets, m)
    print(f"""   losses of the head, Σ m (V - r)^2 and Σ m (u - target)^2:  {numbers(*head.values())}     value.value_loss
   target = (e^(r/β) - e^(r_lo/β)) / (e^(r_hi/β) - e^(r_lo/β)): 1 for the right leaf, 0 for the others""")

    # -------------------------------------------------------------------------------------------------- the losses
    written = rollouts.tokens[:, 1:].clamp(max=2)
    theta = PI.log().requires_grad_()
    log_policy = lambda theta: torch.log_softmax(theta, 1)[at_prefix, written] * mask
    old = log_policy(theta).detach()
    entropy = torch.zeros_like(old)  # no bonus
    spread = policy.grpo_advantages(r, w, rollouts.problem)
    mean = (w * r).sum()
    std = (w * (r - mean) ** 2).sum().sqrt()
    base = lambda nodes: (PI[[PREFIXES.index(name(node)) for node in nodes]].log(), None)
    drawn = astar_search.sample(astar_search.root_keys(0, 2, [0]), base, dataclasses.replace(options, K=4))[0].leaves
    samples = [name(leaf) for leaf in drawn for _ in range(leaf.count)]
    found = torch.tensor([1.0 if text == "xb." else -1.0 for text in samples], dtype=torch.float64)
    V_star = policy.optimal_value(found, BETA)
    print(f"""
5  Three losses at θ = θ_old, where every ratio is 1, and their gradients
   ppo    -Σ m min(ratio A, clip(ratio, 1-ε, 1+ε) A),  ratio = π_θ/π_old, ε = 0.2                   policy.ppo_loss
   grpo   the same with A = (r - mean)/std for every token, mean and std weighted by w       policy.grpo_advantages
   apo    Σ w ( β₂ log(π_θ/π_ref)(y) + V* - r )^2,  β₂ = 1, π_ref the table above                   policy.apo_loss
          V* = β₁ log mean e^(r/β₁), β₁ = 1, over samples of π_ref                           policy.optimal_value
   grpo:  mean {numbers(mean)}  std {numbers(std)}
   apo:   samples {' '.join(samples)}   V* {numbers(V_star)}   (also h(x): one of four is right, and u(x) is 1/4)
   Per token, c = ∂loss/∂log π_θ(a|s):   ppo, grpo: c = -m A;   apo: c = 2 w β₂ (V* - r)""")
    losses = {
        "ppo": lambda logp: policy.ppo_loss(logp, old, advantages, entropy, m, CLIP)[0],
        "grpo": lambda logp: policy.ppo_loss(logp, old, spread[:, None] * mask, entropy, m, CLIP)[0],
        "apo": lambda logp: policy.apo_loss(logp, old, mask, r, V_star.expand(len(r)), 1.0, w)[0],
    }
    gradients, slopes, at = {}, {}, {}
    for kind, loss_of in losses.items():
        logp = log_policy(theta)
        at[kind] = loss_of(logp)
        slopes[kind], gradients[kind] = torch.autograd.grad(at[kind], (logp, theta))
        at[kind] = at[kind].detach()
    table(("token", "ppo.A", "grpo.A", "ppo.c", "grpo.c", "apo.c"), of_tokens(advantages, spread, *slopes.values()))
    print("   loss:  " + "   ".join(f"{kind} {numbers(loss)}" for kind, loss in at.items()))
    print("   ∂loss/∂θ(s,a) = Σ over the tokens b written at s of c ( [a = b] - π(a|s) )")
    for kind, gradient in gradients.items():
        table((kind, "a", "b", "."), [(s, *row) for s, row in zip(PREFIXES, gradient.tolist())])

    # -------------------------------------------------------------------------------------------------- one update
    after = (theta - RATE * gradients["ppo"]).detach()
    new = torch.softmax(after, 1)
    print("""
6  One step of ppo: θ ← θ - 2 ∂loss/∂θ (plain gradient descent; train.py has AdamW), π(a|s) = e^θ(s,a) / Σ e^θ""")
    rows = [(s, *row) for s, row in zip(PREFIXES, torch.cat([after, new], 1).tolist())]
    table(("s", "θ(a)", "θ(b)", "θ(.)", "π(a|s)", "π(b|s)", "π(.|s)"), rows)
    print(f"""   π(b.) = π(b|x) π(.|xb):  before {numbers(PI[0, B] * PI[2, END])}  after {numbers(new[0, B] * new[2, END])}
   A second step would see these ratios, and this is what the clip leaves of its c = -m ratio A:
   0 where A > 0 and ratio > 1.2, or A < 0 and ratio < 0.8""")
    logp = log_policy(after.requires_grad_())
    loss = losses["ppo"](logp)
    slope = torch.autograd.grad(loss, logp)[0]
    loss, ratio = loss.detach(), (logp - old).detach().exp()
    table(("token", "ratio", "A", "c"), of_tokens(ratio, advantages, slope))
    print(f"   loss:  ppo {numbers(loss)}")


if __name__ == "__main__":
    main()
