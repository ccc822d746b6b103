"""walk.py -- one problem, from the search to the policy after one update, in small numbers.

    python examples/walk.py

Three letters, at most two of them, and a policy that is a table.  Every number stands beside its
equation.  But for the dice, only numbers printed above it go into it, so each can be recomputed
with a pocket calculator.  (Numbers are computed in float64 and printed with three decimals: your
last digit may differ by one or two.)  Steps 2 to 6 are Gumbel leaves under PPO, with GRPO and apo
beside it.  Step 7 takes the same problem as `python train.py` does: plain A* until right, em.

The functions are the ones that train.py calls; their names stand at the right.  What train.py would
ask a model, the table answers here.
"""

import dataclasses
import math
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search
import policy
import reward as reward_module
import value

LETTERS = "ab.x"  # the tokens 0, 1, 2, 3
LETTER_B = 1
END = 2
PROMPT = 3
PREFIXES = ("x", "xa", "xb")  # rows of the table: all prefixes that are not finished
PI = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)
# What a value head might say of each prefix:
V = torch.tensor([-0.4, -0.9, 0.5], dtype=torch.float64)
U = torch.tensor([0.25, 0.05, 0.7], dtype=torch.float64)
BETA = 1.0  # of the soft value
LAMBDA = 0.5  # of GAE
CLIP = 0.2  # of ppo and grpo
BETA1 = 1.0  # of apo: of V*
BETA2 = 1.0  # of apo: of the regression
RATE = 2.0  # of gradient descent
OPTIONS = astar_search.Options(eos=(END,), K=3, tau=1.0, max_new_tokens=2)
BOUNDS = reward_module.Reward(format_bonus=0.0).bounds  # (r_lo, r_hi)
WIDTH = 116  # columns of the page


@dataclasses.dataclass
class Walk:
    """What each step leaves for the next ones.

    B = 3 leaves, at most T - 1 = 2 tokens each; index t is about the token at t+1 of `x` + leaf.
    """

    h: torch.Tensor = None  # step 1: (3,) nats, of each prefix
    tree: astar_search.Tree = None  # step 2
    rollouts: astar_search.Rollouts = None
    texts: list = None  # of the leaves, such as "xb."
    w: torch.Tensor = None  # step 3: (B,) leaf weights
    r: torch.Tensor = None  # (B,) rewards
    mask: torch.Tensor = None  # step 4: (B, T-1)
    advantages: torch.Tensor = None  # (B, T-1) of GAE
    m: torch.Tensor = None  # (B, T-1) token weights
    old_log_prob: torch.Tensor = None  # step 5: (B, T-1) under the table
    group_advantages: torch.Tensor = None  # (B,) of grpo
    V_star: torch.Tensor = None  # of the prompt, for apo
    ppo_gradient: torch.Tensor = None  # (3, 3) by theta


# ----------------------------------------------------------------------------------------- Printing


def text_of(node):
    """The prefix or completion of a node, after the prompt: x, xb, xb. for example."""
    return "x" + "".join(LETTERS[token] for token in node.tokens())


def numbers(*xs):
    """Three decimals each, without a minus before a zero."""
    return " ".join(f"{round(float(x), 3) + 0.0:8.3f}" for x in xs)


def print_equation(text, function):
    """A line of text with the name of the function that computes it at the right."""
    print(f"{text}{function:>{WIDTH - len(text)}}")


def print_table(headings, rows):
    """A line of headings, then a line (label, numbers) a row."""
    first, *others = headings
    print(f"   {first:8s}" + " ".join(f"{heading:>8s}" for heading in others))
    for label, xs in rows:
        print(f"   {label:8s}" + numbers(*xs))


def token_rows(walk, columns):
    """A row of print_table for each token of the leaves; columns (B,) or (B, T-1)."""
    rows = []
    for i, t in walk.mask.nonzero().tolist():
        text = walk.texts[i]
        xs = [column[i, t] if column.ndim == 2 else column[i] for column in columns]
        rows.append((f"{text[: t + 1]}→{text[t + 1]}", xs))
    return rows


# ------------------------------------------------------------------------------------ 1 The problem


def show_problem(walk):
    """Print the table of the policy and of the value head; compute h."""
    print("1  The problem")
    print(
        "   Letters a, b and . (the end), at most two of them after the prompt x.  "
        'The answer "b." is right.'
    )
    print(
        "   π(·|s) = softmax θ(s,·): a table, θ = log π to begin with.   "
        "V(s), u(s): the value head's two outputs."
    )
    print_equation(
        "   h(s) = log( u e^(r_hi/β) + (1-u) e^(r_lo/β) ),  r_lo = -1, r_hi = 1, β = 1",
        "value.soft_value",
    )
    r_lo, r_hi = BOUNDS
    walk.h = value.soft_value(torch.logit(U), r_lo, r_hi, BETA)
    columns = torch.stack([*PI.T, V, U, walk.h], dim=1)
    print_table(
        ("s", "π(a|s)", "π(b|s)", "π(.|s)", "V(s)", "u(s)", "h(s)"), zip(PREFIXES, columns.tolist())
    )


# ------------------------------------------------------------------------------------- 2 The search


class TableExpander:
    """What astar_search.Expander is for a model: expand(nodes), and what `collect` reads of it."""

    def __init__(self, h):
        self.h = h
        self.prompts = [[PROMPT]]
        self.span = 3  # longest path in tokens
        self.values = torch.cat([torch.zeros(1), V.float()])  # row 0 is for padding
        self.hidden = torch.zeros(len(self.values), 1)  # V and u are given: there is no head
        self.spent = [0]
        self.forwards = 0

    def __call__(self, nodes):
        """log pi of the children (n, 3), and their h (n, 1): they inherit it."""
        rows = [PREFIXES.index(text_of(node)) for node in nodes]
        for node, row in zip(nodes, rows):
            node.slot = row + 1
        self.forwards += 1
        self.spent[0] += len(nodes)
        return PI[rows].log(), self.h[rows, None]


def queue_text(entries):
    """Entries (-f, node) of the queue, the largest f first."""
    return "   ".join(f"{text_of(node)}{numbers(-key)}" for key, node in sorted(entries))


class PrintedTree(astar_search.Tree):
    """The search's own tree, which also prints each node as it is popped."""

    def accept_leaf(self, leaf):
        self.print_popped(leaf)
        super().accept_leaf(leaf)

    def push_child(self, parent, rank):
        if rank == 0:  # an inner node was popped, and its best child is queued
            self.print_popped(parent)
        return super().push_child(parent, rank)

    def print_popped(self, node):
        """Print the queue as it was before `node` was popped, then the node and its children."""
        print(f"   queue:   {queue_text([*self.queue, (-node.f, node)])}")
        facts = {"g": node.g, "G": node.G, "h": node.h, "f": node.f}
        if self.options.tau == 0:
            del facts["G"]  # there is no noise
        line = "".join(f"  {letter}{numbers(x)}" for letter, x in facts.items())
        print(f"   pop {text_of(node):4s}{line}{'   a leaf' if node.is_leaf else ''}")
        if not node.is_leaf:
            print_children(node, noise=self.options.tau > 0)


def print_children(node, noise):
    """The children of an evaluated node, in the order of the letters; their noise if there is."""
    rows = []
    for child in sorted(node.children, key=lambda child: child["token"]):
        columns = {"logπ": child["log_prob"], "g": child["g"]}
        if noise:
            gumbel = astar_search.gumbel(torch.tensor(child["key"].item())).item()
            columns |= {"Gumbel": gumbel, "noisy": child["g"] + gumbel, "G": child["G"]}
        columns |= {"h": child["h"], "f": child["f"]}
        rows.append((text_of(node) + LETTERS[child["token"]], columns.values()))
    print_table(("child" if noise else "below", *columns), rows)


def show_search(walk):
    """Search for K = 3 leaves; print every node when it is popped."""
    print()
    print_equation(
        "2  The search: pop the largest f, push its best child and its next sibling",
        "astar_search.Tree.pop_evaluated_nodes",
    )
    print_equation(
        "   g(sa) = g(s) + log π(a|s),  h(sa) = h(s) (deferred),  f = (1-τ) g + τ G + h, τ = 1",
        "astar_search.search_key",
    )
    print(
        "   G(x) and the Gumbels are dice (a hash of the path); "
        "noisy = g + Gumbel, Z = the largest of the siblings' noisy,"
    )
    print_equation(
        "   v = G(s) - noisy + log(1 - e^(noisy-Z)),  G(sa) = G(s) - max(0,v) - log(1 + e^(-|v|))",
        "astar_search.perturb",
    )
    expander = TableExpander(walk.h)
    keys = astar_search.root_keys(seed=0, iteration=1, indices=[0])
    trees = astar_search.search(keys, expander, OPTIONS, tree_class=PrintedTree)
    walk.tree = trees[0]
    walk.rollouts = astar_search.collect(trees, expander)
    walk.texts = [text_of(leaf) for leaf in walk.tree.leaves]
    print(f"   K = {OPTIONS.K} leaves: done")
    print(f"   left on the queue:   {queue_text(walk.tree.queue)}")


# ----------------------------------------------------------------------------------- 3 Leaf weights


def reward_of(text):
    """1 for the right completion, else -1."""
    return 1.0 if text == "xb." else -1.0


def show_leaf_weights(walk):
    """Print pi/q and w, which is pi/q normalised to a sum of one, and the rewards."""
    kappa = -walk.tree.queue[0][0]
    print()
    print_equation(
        f"3  Leaf weights: κ = {numbers(kappa).strip()}, the best key left behind",
        "astar_search.log_inclusion",
    )
    print(
        "   φ = g + h (without noise),  q = 1 - exp(-exp((φ-κ)/τ)),  weight = π/q, π = e^g;  "
        "w = weight / their sum"
    )
    print_equation(
        "   (unbiased for a constant h; ours is learned, so they are approximate)",
        "policy.normalise_weights",
    )
    walk.w = policy.normalise_weights(walk.rollouts.weight.double(), walk.rollouts.problem)
    walk.r = torch.tensor([reward_of(text) for text in walk.texts], dtype=torch.float64)
    rows = []
    for i, leaf in enumerate(walk.tree.leaves):
        phi = leaf.g + leaf.h
        q = math.exp(astar_search.log_inclusion(phi, kappa, OPTIONS.tau))
        rows.append((walk.texts[i], (leaf.g, leaf.h, phi, q, leaf.weight, walk.w[i], walk.r[i])))
    print_table(("leaf", "g", "h", "φ", "q", "weight", "w", "r"), rows)


# ------------------------------------------------------------------------------------- 4 Advantages


def prefix_rows(walk):
    """(B, T-1) row of the table of the prefix before each token; 0 off the mask."""
    rows = torch.zeros_like(walk.mask, dtype=torch.int64)
    for i, t in walk.mask.nonzero().tolist():
        rows[i, t] = PREFIXES.index(walk.texts[i][: t + 1])
    return rows


def show_advantages(walk):
    """Print GAE and the weight of each token, and the two losses of the value head."""
    print()
    print_equation(
        "4  Advantages: δ_t = r_t + V(s_(t+1)) - V(s_t),  A_t = δ_t + λ A_(t+1),  λ = 0.5",
        "value.gae",
    )
    print(
        "   r_t = 0 but at the last token, where V(s_(t+1)) = 0.   "
        "m_t = w / (sum of w over all tokens): the token's weight"
    )
    walk.mask = walk.rollouts.mask
    values = walk.rollouts.values.double()
    walk.advantages = value.gae(walk.r, values, walk.mask, LAMBDA)
    deltas = value.gae(walk.r, values, walk.mask, 0.0)  # with lambda = 0: A_t = delta_t
    m = walk.w[:, None] * walk.mask
    walk.m = m / m.sum()
    print_table(
        ("token", "w", "V(s_t)", "δ_t", "A_t", "m_t"),
        token_rows(walk, [walk.w, values, deltas, walk.advantages, walk.m]),
    )

    r_lo, r_hi = BOUNDS
    returns = value.monte_carlo_returns(walk.r, walk.mask)
    _, losses = value.value_loss(
        values=values,
        u_logit=torch.logit(U[prefix_rows(walk)]),
        returns=returns,
        targets=value.soft_target(returns, r_lo, r_hi, BETA),
        token_weights=walk.m,
    )
    print_equation(
        "   losses of the head, Σ m (V - r)^2 and Σ m (u - target)^2:  "
        + numbers(*losses.values()),
        "value.value_loss",
    )
    print(
        "   target = (e^(r/β) - e^(r_lo/β)) / (e^(r_hi/β) - e^(r_lo/β)): "
        "1 for the right leaf, 0 for the others"
    )


# ----------------------------------------------------------------------------------- 5 Three losses


def token_log_prob(walk, theta):
    """log pi_theta (B, T-1) of the tokens of the leaves, 0 off the mask; theta (3, 3)."""
    tokens = walk.rollouts.tokens[:, 1:]
    return torch.log_softmax(theta, dim=1)[prefix_rows(walk), tokens] * walk.mask


def policy_loss(walk, kind, log_prob):
    """The loss called `kind` at log pi_theta (B, T-1) of the tokens."""
    if kind == "apo":
        loss, _ = policy.apo_loss(
            log_prob=log_prob,
            ref_log_prob=walk.old_log_prob,
            mask=walk.mask,
            rewards=walk.r,
            optimal_values=walk.V_star.expand(len(walk.r)),
            beta2=BETA2,
            leaf_weights=walk.w,
        )
        return loss
    if kind == "ppo":
        advantages = walk.advantages
    else:
        advantages = walk.group_advantages[:, None] * walk.mask
    loss, _ = policy.ppo_loss(
        log_prob=log_prob,
        old_log_prob=walk.old_log_prob,
        advantages=advantages,
        entropy=torch.zeros_like(log_prob),  # no bonus
        token_weights=walk.m,
        clip=CLIP,
    )
    return loss


def loss_and_gradients(walk, kind, theta):
    """(loss, its gradient by the log-probability of each token (B, T-1), by theta (3, 3))."""
    theta = theta.clone().requires_grad_()
    log_prob = token_log_prob(walk, theta)
    loss = policy_loss(walk, kind, log_prob)
    by_token, by_theta = torch.autograd.grad(loss, (log_prob, theta))
    return loss.detach(), by_token, by_theta


def print_loss_equations():
    """The head of step 5."""
    print()
    print("5  Three losses at θ = θ_old, where every ratio is 1, and their gradients")
    print_equation(
        "   ppo    -Σ m min(ratio A, clip(ratio, 1-ε, 1+ε) A),  ratio = π_θ/π_old, ε = 0.2",
        "policy.ppo_loss",
    )
    print_equation(
        "   grpo   the same with A = (r - mean)/std for every token, mean and std weighted by w",
        "policy.grpo_advantages",
    )
    print_equation(
        "   apo    Σ w ( β₂ log(π_θ/π_ref)(y) + V* - r )^2,  β₂ = 1, π_ref the table above",
        "policy.apo_loss",
    )
    print_equation(
        "          V* = β₁ log mean e^(r/β₁), β₁ = 1, over samples of π_ref", "policy.optimal_value"
    )


def sample_completions(walk, n):
    """n i.i.d. completions of the table, as text."""
    keys = astar_search.root_keys(seed=0, iteration=2, indices=[0])
    options = dataclasses.replace(OPTIONS, K=n)
    (tree,) = astar_search.sample(keys, TableExpander(walk.h), options)
    texts = []
    for leaf in tree.leaves:
        texts.extend([text_of(leaf)] * leaf.count)
    return texts


def show_losses(walk):
    """Print ppo, grpo and apo at theta_old with their gradients."""
    print_loss_equations()
    walk.group_advantages = policy.grpo_advantages(walk.r, walk.w, walk.rollouts.problem)
    mean = (walk.w * walk.r).sum()
    std = (walk.w * (walk.r - mean) ** 2).sum().sqrt()
    print(f"   grpo:  mean {numbers(mean)}  std {numbers(std)}")

    samples = sample_completions(walk, n=4)
    rewards = torch.tensor([reward_of(text) for text in samples], dtype=torch.float64)
    walk.V_star = policy.optimal_value(rewards, BETA1)
    print(
        f"   apo:   samples {' '.join(samples)}   V* {numbers(walk.V_star)}   "
        "(also h(x): one of four is right, and u(x) is 1/4)"
    )

    theta = PI.log()
    walk.old_log_prob = token_log_prob(walk, theta)
    ppo_loss, ppo_c, walk.ppo_gradient = loss_and_gradients(walk, "ppo", theta)
    grpo_loss, grpo_c, grpo_gradient = loss_and_gradients(walk, "grpo", theta)
    apo_loss, apo_c, apo_gradient = loss_and_gradients(walk, "apo", theta)
    print(
        "   Per token, c = ∂loss/∂log π_θ(a|s):   ppo, grpo: c = -m A;   apo: c = 2 w β₂ (V* - r)"
    )
    print_table(
        ("token", "ppo.A", "grpo.A", "ppo.c", "grpo.c", "apo.c"),
        token_rows(walk, [walk.advantages, walk.group_advantages, ppo_c, grpo_c, apo_c]),
    )
    print(
        f"   loss:  ppo {numbers(ppo_loss)}   grpo {numbers(grpo_loss)}   apo {numbers(apo_loss)}"
    )
    print("   ∂loss/∂θ(s,a) = Σ over the tokens b written at s of c ( [a = b] - π(a|s) )")
    print_table(("ppo", "a", "b", "."), zip(PREFIXES, walk.ppo_gradient.tolist()))
    print_table(("grpo", "a", "b", "."), zip(PREFIXES, grpo_gradient.tolist()))
    print_table(("apo", "a", "b", "."), zip(PREFIXES, apo_gradient.tolist()))


# --------------------------------------------------------------------------------------- 6 One step


def probability_of_b_end(pi):
    """pi of the right completion, b then the end; pi (3, 3)."""
    return pi[PREFIXES.index("x"), LETTER_B] * pi[PREFIXES.index("xb"), END]


def show_update(walk):
    """Take one step of ppo; print pi after it, and what the clip leaves of a second one."""
    print()
    print(
        "6  One step of ppo: θ ← θ - 2 ∂loss/∂θ (plain gradient descent; train.py has AdamW), "
        "π(a|s) = e^θ(s,a) / Σ e^θ"
    )
    theta = PI.log() - RATE * walk.ppo_gradient
    pi = torch.softmax(theta, dim=1)
    print_table(
        ("s", "θ(a)", "θ(b)", "θ(.)", "π(a|s)", "π(b|s)", "π(.|s)"),
        zip(PREFIXES, torch.cat([theta, pi], dim=1).tolist()),
    )
    before = numbers(probability_of_b_end(PI))
    after = numbers(probability_of_b_end(pi))
    print(f"   π(b.) = π(b|x) π(.|xb):  before {before}  after {after}")
    print(
        "   A second step would see these ratios, "
        "and this is what the clip leaves of its c = -m ratio A:"
    )
    print("   0 where A > 0 and ratio > 1.2, or A < 0 and ratio < 0.8")
    loss, c, _ = loss_and_gradients(walk, "ppo", theta)
    ratio = (token_log_prob(walk, theta) - walk.old_log_prob).exp()
    print_table(("token", "ratio", "A", "c"), token_rows(walk, [ratio, walk.advantages, c]))
    print(f"   loss:  ppo {numbers(loss)}")


# -------------------------------------------------------------------------- 7 The default algorithm


def is_right(leaf):
    """For Options.until: in training the search is told what is right."""
    return reward_of(text_of(leaf)) == 1.0


def plain_search(h):
    """Plain A* until right, printed.  h (3,): of each prefix.  Returns (Tree, Rollouts)."""
    options = dataclasses.replace(OPTIONS, tau=0.0, K=8, until=is_right)
    expander = TableExpander(h)
    keys = astar_search.root_keys(seed=0, iteration=1, indices=[0])
    trees = astar_search.search(keys, expander, options, tree_class=PrintedTree)
    leaves = " ".join(text_of(leaf) for leaf in trees[0].leaves)
    print(f"   {text_of(trees[0].leaves[-1])} is right: done; leaves {leaves}")
    return trees[0], astar_search.collect(trees, expander)


def show_default(walk):
    """The same problem by plain A* until right (tau = 0) and em, with its own update."""
    print()
    print(
        "7  As python train.py does it: plain A* (τ = 0, f = g + h) until a leaf is right, and em"
    )
    print("   First with the h of step 1:")
    plain_search(walk.h)
    print("   Now with h = 0 (--guide none).  In a tie of f the smaller path comes first.")
    tree, rollouts = plain_search(torch.zeros(3, dtype=torch.float64))

    walk.rollouts = rollouts
    walk.texts = [text_of(leaf) for leaf in tree.leaves]
    walk.mask = rollouts.mask
    pi = torch.tensor([math.exp(leaf.g) for leaf in tree.leaves], dtype=torch.float64)
    walk.r = torch.tensor([reward_of(text) for text in walk.texts], dtype=torch.float64)
    walk.w = policy.normalise_weights(rollouts.weight.double(), rollouts.problem)
    targets = value.soft_target(walk.r, *BOUNDS, BETA)
    A = policy.em_advantages(targets, walk.w, rollouts.problem, correct=walk.r == 1.0)
    print_equation(
        "   em: w = π / Σ π (no noise, no q),  t = target of step 4,  Z = Σ w t,  A = t_max t / Z",
        "policy.em_advantages",
    )
    columns = torch.stack([pi, walk.w, walk.r, targets, A], dim=1)
    print_table(("found", "π", "w", "r", "t", "A"), zip(walk.texts, columns.tolist()))

    m = walk.w[:, None] * walk.mask
    walk.m = m / m.sum()
    walk.advantages = A[:, None] * walk.mask
    walk.old_log_prob = token_log_prob(walk, PI.log())
    # em has the loss of ppo; the advantages alone are others.
    loss, c, gradient = loss_and_gradients(walk, "ppo", PI.log())
    print("   The loss is that of ppo, c = -m A.  A wrong leaf has c = 0, so it is not run at all.")
    print_table(("written", "m", "A", "c"), token_rows(walk, [walk.m, walk.advantages, c]))
    print(f"   loss:  em {numbers(loss)}")
    print_table(("em", "a", "b", "."), zip(PREFIXES, gradient.tolist()))
    after = torch.softmax(PI.log() - RATE * gradient, dim=1)
    print("   One step, θ ← θ - 2 ∂loss/∂θ:")
    print_table(("then", "π(a|s)", "π(b|s)", "π(.|s)"), zip(PREFIXES, after.tolist()))
    before = numbers(probability_of_b_end(PI))
    print(f"   em: π(b.)  before {before}  after {numbers(probability_of_b_end(after))}")


def main():
    """The seven steps."""
    walk = Walk()
    show_problem(walk)
    show_search(walk)
    show_leaf_weights(walk)
    show_advantages(walk)
    show_losses(walk)
    show_update(walk)
    show_default(walk)


if __name__ == "__main__":
    main()
