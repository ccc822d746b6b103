"""astar_search.py -- token-level A* search over KV-cached prefixes: the rollouts of A*PO.

A rollout is a path in the tree of token sequences below a prompt.  Write s for a prefix of the
completion, y for a finished completion, pi for the policy, r in [r_lo, r_hi] for the reward of y,
and beta for a temperature.  Under the KL-regularised optimum pi*(y|x) ~ pi(y|x) exp(r(y)/beta), a
prefix has the probability

    log pi*(s|x) = log pi(s|x) + V*(s)/beta - V*(x)/beta
                   `--- g(s) --'  `- h(s) -'
    V*(s) = beta log E_{y ~ pi(.|s)} exp(r(y)/beta)

So best-first search by f = g + h opens prefixes in the order of their probability under the optimal
policy.  g and h are both in nats.  If h is exact, f does not rise along a path (by the soft Bellman
equation), and the leaves come out in the order of log pi(y) + r(y)/beta.  A learned h is neither
exact nor a bound; then this is a heuristic search.

*Stochastic* search (tau = 1) replaces g by a perturbed one, so that the leaves are random draws:

    G(root) ~ Gumbel(0)
    G(s)    = max over the leaves y below s of log pi(y) + Gumbel(y), drawn from the root down
    f       = (1 - tau) g + tau G + h          tau = 0: plain A*;   tau = 1: Gumbel search

The K best leaves are then K draws *without replacement* from exp((log pi + h)/tau).  If h is
constant, that is pi (stochastic beam search, Kool et al. 2019, arXiv 1903.06059).  If a leaf's h is
r/beta and every inner h is a bound, that is pi* (A* sampling, Maddison et al. 2014, arXiv
1411.0030).  With the soft value as h the set is approximate.

Departures from the literature:
- h is *deferred*: every child inherits the h of the node that was expanded.  So a node costs one
  model token, like a sampled one, and its h is one step old.
- A problem may stop once its leaves cover a given mass of pi (`cover`), or with its first right
  leaf (`until`).
- The noise is a hash of the path and not a stream of random numbers.  So, but for the rounding of
  the model, a rollout does not depend on the width, on the other problems of the batch, or on the
  rank that runs it; and no random state has to be saved.

In this file, in reading order: node, tree, search, children, noise, leaf weights, sampling, the
KV-cached language model, Rollouts, one text completed, a demonstration.  The last four sections
may be skipped: texts, the check of a model, an optimisation for large vocabularies, and how a tree
is shown.

    python astar_search.py     # searches that are small enough to be checked by hand
"""

import bisect
import contextlib
import functools
import heapq
import html
import math
import operator
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

# --------------------------------------------------------------------------------------------- Node


@dataclass(frozen=True)
class Options:
    """Bounds and temperature of a search."""

    eos: tuple  # token ids that end a completion
    # node -> bool: does its token end the completion too?  For example StopTexts.
    stop: Callable | None = None
    K: int = 8  # leaves wanted
    tau: float = 1.0  # 0: plain A*; 1: Gumbel search
    width: int = 1  # nodes of one problem that a round may evaluate at once
    max_new_tokens: int = 64  # longest completion
    max_nodes: int = 1 << 30  # most nodes expanded for one problem
    max_open: int = 1 << 30  # longest queue: the beam width
    cover: float = math.inf  # stop once the leaves hold this much of pi
    # leaf -> bool: stop with the first leaf for which it is true.  It may know the reward, so it is
    # for training only.
    until: Callable | None = None


@dataclass(eq=False, slots=True)
class Node:
    """A prefix of a completion.  `parent is None` at the root, which stands for the prompt."""

    problem: int  # row of the batch
    parent: "Node | None"
    token: int
    depth: int  # tokens of the completion up to here
    f: float  # the search key
    h: float = 0.0  # nats
    g: float = 0.0  # log pi of the prefix
    G: float = 0.0  # g perturbed
    log_prob: float = 0.0  # log pi of the last token
    key: int = 0  # hash of the path
    rank: int = 0  # place among its siblings by f
    is_leaf: bool = False
    truncated: bool = False  # a leaf because max_new_tokens cut it, not by EOS or options.stop
    children: object = None  # records of top_children, best first; None until it was evaluated
    has_all_children: bool = False  # `children` lists every child
    slot: int | None = None  # where its K/V lies in the cache
    count: int = 1  # draws that ended here (sampling)
    weight: float = 1.0  # pi/q of an accepted leaf
    text_end: object = None  # what options.stop keeps of the text up to here

    def path_nodes(self):
        """The nodes from the first token of the completion to this one, as a list."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def successors(self):
        """What is queued when the node is popped: its best child, and its next sibling.

        A list of (parent, rank): child number `rank` by f of that parent, which may not exist.
        """
        successors = []
        if not self.is_leaf:
            successors.append((self, 0))
        if self.parent is not None:
            successors.append((self.parent, self.rank + 1))
        return successors

    def knows_child(self, rank):
        """Is it known which child is number `rank` by f, or else that there is none?"""
        if self.children is None:
            return False
        return rank < len(self.children) or self.has_all_children

    def tokens(self):
        """Tokens of the completion up to here, as a list."""
        return [node.token for node in self.path_nodes()]

    def mark_leaf(self, options):
        """Make the node a leaf if its token ends the completion, or if the limit cuts it there."""
        ended = self.token in options.eos
        if not ended and options.stop is not None:
            ended = options.stop(self)
        self.truncated = not ended and self.depth >= options.max_new_tokens
        self.is_leaf = ended or self.truncated

    def __lt__(self, other):
        """heapq asks this only if two keys are equal.  Ties break by path."""
        return self.tokens() < other.tokens()


# --------------------------------------------------------------------------------------------- Tree


class Tree:
    """The search of one problem: a priority queue of prefixes, and the leaves accepted in order.

    A second search runs ahead of it, to say early what the model should be run on (look_ahead).
    """

    def __init__(self, problem, key, options):
        G = gumbel(torch.tensor(key)).item()  # G(root) ~ Gumbel(0)
        self.root = Node(problem, parent=None, token=-1, depth=0, f=math.inf, G=G, key=key)
        self.options = options
        self.queue = [(-math.inf, self.root)]  # heapq pops the smallest, so the queue holds -f
        self.leaves = []
        self.pops = 0  # inner nodes expanded
        self.mass = 0.0  # sum of pi over the leaves
        self.pruned = False  # did the queue ever exceed max_open?
        self.until_met = False  # options.until was true for the last leaf
        self.covering = None  # how many leaves it took until they held options.cover of pi
        self.stopped = None  # why the search ended; None while it goes on
        self.nodes = {}  # (parent, rank) -> Node, for all that were queued by either search
        self.tokenizer = None  # of text(): without one, text is token ids
        self.prompt = []  # token ids
        self.start_ahead()

    def text(self, node):
        """The text of a prefix, behind the prompt; its token ids if the tree has no tokenizer."""
        if self.tokenizer is None:
            return " ".join(str(token) for token in node.tokens())
        return text_after(self.tokenizer, self.prompt, node.tokens())

    def __repr__(self):
        return list_leaves(self)

    def _repr_html_(self):
        return draw_outline(self)

    def start_ahead(self):
        """Start the search that runs ahead: from here on, with what was found so far."""
        self.ahead = list(self.queue)  # its own queue of (-f, node); a copy of a heap is a heap
        self.ahead_leaves = sorted(-leaf.f for leaf in self.leaves)  # -f of the leaves it popped
        self.ahead_mass = self.mass
        self.unknown = []  # (parent, rank) of children that it queues once they are known

    def stop_reason(self):
        """Why the search ends now, as a word for the log; None while it goes on."""
        options = self.options
        if self.until_met:
            return "done"
        if len(self.leaves) >= options.K and self.knows_next_leaf_key():
            return "leaves"
        # At tau = 1 one more leaf is drawn.  It stands for all that is not covered (weigh_leaves).
        if self.covering and (options.tau < 1 or len(self.leaves) > self.covering):
            return "covered"
        if not self.queue:
            return "exhausted"
        if self.pops >= options.max_nodes and not self.queue[0][1].is_leaf:
            return "max_nodes"
        return None

    def knows_next_leaf_key(self):
        """Is the key of leaf K+1, which the leaf weights need, the one at the head of the queue?

        At tau = 1 it is, for a constant h: G of a prefix is the maximum over the leaves below it.
        For 0 < tau < 1 the head is only a bound until it is a leaf, so the search goes on until
        then.  At tau = 0 there are no such weights.
        """
        if self.options.tau in (0, 1) or not self.queue:
            return True
        return self.queue[0][1].is_leaf

    def unevaluated(self, node):
        """Nodes that the model must run before `node` may be popped, as a list.

        The node itself, if its children are unknown.  Its parent, if the next sibling is unknown.
        """
        return [parent for parent, rank in node.successors() if not parent.knows_child(rank)]

    def next_to_evaluate(self):
        """Nodes for the next round: what the head of the queue lacks, then speculation, as a list.

        Speculation changes what is known early, and never what is popped.
        """
        nodes = dict.fromkeys(self.unevaluated(self.queue[0][1]))  # a set with a fixed order
        if self.options.width > 1:
            self.look_ahead(nodes)
        return list(nodes)

    def look_ahead(self, nodes):
        """Add to `nodes`, up to `width`, others that the search will probably need.

        The search needs next what lies below the head of its queue, a token deeper each round.  The
        other entries of the queue are soon evaluated, and then they offer nothing.  So a second
        search runs ahead.  It obeys the same rules but one: it does not wait for the model.  It
        pops a node at once, and queues the children a round later, when they are known.  So it
        goes down many paths at a time.  Each node is popped once, so a round costs little.
        """
        options = self.options
        if self.pruned:  # a beam dropped entries: what lies below them is not needed any more
            self.start_ahead()
        successors = self.unknown  # the last round made them known
        self.unknown = []
        self.queue_ahead(successors, nodes)
        # f is in nats.  An entry that is `width` times less probable than the head is not worth one
        # of `width` places.
        lowest_f = self.queue[0][1].f - math.log(options.width)
        while self.ahead and self.ahead[0][1].f >= lowest_f:
            # A node may hold one of the leaves that are wanted beside the known better ones, and
            # takes a pop at least.
            better_leaves = bisect.bisect(self.ahead_leaves, self.ahead[0][0])
            most = min(options.width, options.K - better_leaves, options.max_nodes - self.pops)
            if len(nodes) >= most or self.ahead_mass >= options.cover:
                return
            _, node = heapq.heappop(self.ahead)
            if node.is_leaf:
                bisect.insort(self.ahead_leaves, -node.f)
                self.ahead_mass += math.exp(node.g)
            self.queue_ahead(node.successors(), nodes)

    def queue_ahead(self, successors, nodes):
        """Queue children for the search that runs ahead; ask for the parents of unknown ones."""
        for parent, rank in successors:
            if not parent.knows_child(rank):
                nodes[parent] = None
                self.unknown.append((parent, rank))
                continue
            child = self.child(parent, rank)
            if child is not None:
                heapq.heappush(self.ahead, (-child.f, child))

    def pop_evaluated_nodes(self):
        """Continue the search of width 1 as far as it is evaluated.  Sets `stopped` at its end.

        While the head of the queue is evaluated, pop it.  A leaf is accepted.  An inner node is
        replaced by its best child.  In both cases the next sibling is queued.
        """
        while True:
            self.stopped = self.stop_reason()
            if self.stopped or self.unevaluated(self.queue[0][1]):
                return
            _, node = heapq.heappop(self.queue)  # the largest f
            if node.is_leaf:
                self.accept_leaf(node)
            else:
                self.pops += 1
            for parent, rank in node.successors():
                self.push_child(parent, rank)
            if len(self.queue) > self.options.max_open:  # a beam keeps only the best
                self.queue = heapq.nsmallest(self.options.max_open, self.queue)
                self.pruned = True

    def accept_leaf(self, leaf):
        """Add a popped leaf to the leaves."""
        self.leaves.append(leaf)
        self.mass += math.exp(leaf.g)
        if self.covering is None and self.mass >= self.options.cover:
            self.covering = len(self.leaves)
        if self.options.until is not None:
            self.until_met = self.options.until(leaf)

    def push_child(self, parent, rank):
        """Queue the child of `parent` that is number `rank` by f; return it, or None.

        A node queues its best child when it is popped, and its next sibling.  So the queue stays
        short, and every child can still be reached.
        """
        node = self.child(parent, rank)
        if node is not None:
            heapq.heappush(self.queue, (-node.f, node))
        return node

    def child(self, parent, rank):
        """The child of an evaluated node that is number `rank` by f; None if there is none.

        It is the same Node for both searches, because the model's results are kept on it.
        """
        if rank >= len(parent.children):
            return None
        node = self.nodes.get((parent, rank))
        if node is None:
            # The record as Python numbers, in the order of the columns of score_children.
            f, h, g, G, log_prob, token, key = parent.children[rank].item()[:7]
            node = Node(
                parent.problem, parent, token, parent.depth + 1, f, h, g, G, log_prob, key, rank
            )
            node.mark_leaf(self.options)
            self.nodes[parent, rank] = node
        return node

    def weigh_leaves(self):
        """Set the importance weight of each accepted leaf: the sum of weight * r estimates E_pi[r].

        The estimate is unbiased for a constant h and tau > 0, if every search ends at K leaves, or
        if every one ends by covered mass at tau = 1.  It is approximate if some searches end the
        one way and some the other, for a learned h, and for a search that ended by `until`, by
        max_nodes, or by covered mass at tau < 1.  There are no importance weights at tau = 0, where
        nothing is random, nor after pruning, which loses the key of leaf K+1.  Then each leaf is
        weighted by its share of the leaves' pi.
        """
        if not self.leaves:
            return
        tau = self.options.tau
        if self.pruned or tau == 0:
            # exp(g) of all leaves may underflow to 0, so the largest g is subtracted.
            largest_g = max(leaf.g for leaf in self.leaves)
            total = sum(math.exp(leaf.g - largest_g) for leaf in self.leaves)
            for leaf in self.leaves:
                leaf.weight = math.exp(leaf.g - largest_g) / total
        elif self.stopped == "covered" and tau == 1:
            # The last leaf is a draw from the rest of pi and stands for the whole rest; each other
            # leaf stands for itself.  Under a constant h that is unbiased, because the other leaves
            # alone decided on the stop (the sum-and-sample estimator, Kool et al. 2020, arXiv
            # 2002.06043, section 3.2).  Under another h the last leaf is drawn from pi exp(h), in
            # favour of what h likes; only the rest, at most 1 - cover, is affected.
            for leaf in self.leaves:
                leaf.weight = math.exp(leaf.g)
            last = self.leaves[-1]
            last.weight = max(0.0, 1.0 - (self.mass - math.exp(last.g)))
        else:
            # pi/q, q the probability that a leaf is among those found (the same paper, eq. 9).
            # kappa: the key of leaf K+1, which is the best one on the queue
            kappa = -self.queue[0][0] if self.queue else -math.inf
            for leaf in self.leaves:
                log_q = log_inclusion(leaf.g + leaf.h, kappa, tau)
                leaf.weight = math.exp(leaf.g - log_q)


# ------------------------------------------------------------------------------------------- Search


def search(keys, expand, options, tree_class=Tree):
    """Best-first search of N problems in lock-step.  It knows no model.

    keys: N root keys (root_keys).
    expand(nodes) -> (log pi of the children (n, V), their h in nats (n, V) or (n, 1)); a node may
        be asked again for more children.
    options: Options.
    tree_class: Tree, or a subclass of it that records what happens.

    Returns N Trees with `leaves` in the order accepted, `stopped`, `pops`.  If expand gives a node
    the same numbers in every round, these depend neither on options.width nor on other problems.
    """
    trees = [tree_class(row, key, options) for row, key in enumerate(keys)]
    while True:
        nodes = []
        for tree in trees:
            if not tree.stopped:
                nodes.extend(tree.next_to_evaluate())
        if not nodes:
            break
        evaluate_nodes(nodes, expand, options)  # one round: one forward, one copy to the host
        for tree in trees:
            if not tree.stopped:
                tree.pop_evaluated_nodes()
    for tree in trees:
        tree.weigh_leaves()
    return trees


def ask(expand, nodes):
    """expand(nodes).  Raises ValueError unless it returns what `search` asks for."""
    answer = expand(nodes)
    wanted = "expand must return two tensors, log pi (n, V) and h (n, V) or (n, 1)"
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise ValueError(f"{wanted}, not one {type(answer).__name__}")
    kinds = [type(part).__name__ for part in answer if not isinstance(part, torch.Tensor)]
    if kinds:
        raise ValueError(f"{wanted}, not a {kinds[0]}: torch.tensor(...) makes one of a list")
    log_probs, h = answer
    n = len(nodes)
    shapes = f"{tuple(log_probs.shape)} and {tuple(h.shape)}"
    if log_probs.ndim != 2 or h.ndim != 2 or len(log_probs) != n or len(h) != n:
        raise ValueError(f"{wanted} with n = {n} nodes, not {shapes}")
    if h.shape[1] not in (1, log_probs.shape[1]):
        raise ValueError(f"{wanted}, not {shapes}")
    return log_probs, h


def evaluate_nodes(nodes, expand, options):
    """Run the model on nodes and store their best children in them."""
    log_probs, h = ask(expand, nodes)
    # K leaves and the key after them lie below K + 1 children at most, the best ones, as long as
    # the order of leaves is that of their prefixes.  A node that is asked again gets as many more.
    most_known = max(0 if node.children is None else len(node.children) for node in nodes)
    count = options.K + 1 + most_known
    parents = [(node.g, node.G, node.key) for node in nodes]
    table = top_children_fast(log_probs, h, parents, options.tau, count)
    V = log_probs.shape[1]
    possible = (table["f"] > -math.inf).sum(axis=1).tolist()
    for node, row, n in zip(nodes, table, possible):
        node.has_all_children = n < count or n == V
        if node.children is None:
            node.children = row[:n]
            continue
        # The node was asked before.  What is known stays, in its order, because some of it has been
        # queued.  (Numbers that are computed twice can differ by rounding and swap near ties.)
        known = {child["token"].item() for child in node.children}
        new = [child for child in row[:n] if child["token"].item() not in known]
        node.children = [*node.children, *new]


# ----------------------------------------------------------------------------------------- Children


def search_key(g, G, h, tau):
    """The key f of children: g, G, h of one shape, in nats."""
    # f = (1 - tau) g + tau G + h
    f = G + h if tau == 1 else (1 - tau) * g + tau * G + h
    # An impossible child has g = -inf; without this line, tau = 0 would make a NaN of it.
    return torch.where(g.isneginf(), -math.inf, f)


def top_children(log_probs, h, parents, tau, count):
    """The `count` best children of n nodes by search key, best first; in a tie the smaller token.

    log_probs (n, V): log pi(a|s).  h (n, V) or (n, 1), in nats.  parents: n tuples (g, G, key).

    Returns a numpy array of records (n, count) with the fields f, h, g, G, log_prob, token and key.
    f is -inf where a node has no such child.  There is one copy from the device to the host,
    whatever n is.  Raises FloatingPointError at a NaN.
    """
    n, V = log_probs.shape
    tokens = torch.arange(V, device=log_probs.device).expand(n, V)
    columns = score_children(log_probs, h, tokens, parents, tau, min(count, V))
    return to_host(columns)


def score_children(log_probs, h, tokens, parents, tau, count):
    """The best `count` of the given tokens (n, M) as children: {column: (n, count)}, on the device.

    Keys are compared across the whole tree.  They are float64, because in float32 two leaves of a
    long search could swap places.
    """
    n, V = log_probs.shape
    g_parent, G_parent, key_parent = zip(*parents)
    both = torch.tensor([g_parent, G_parent], dtype=torch.float64, device=log_probs.device)
    g_parent, G_parent = both  # by one copy from the host
    key_parent = torch.tensor(key_parent, dtype=torch.int64, device=log_probs.device)

    log_prob = log_probs.gather(1, tokens).double()  # (n, M)
    h_child = h.double().expand(n, V).gather(1, tokens)  # (n, M)
    key = mix64(key_parent[:, None], tokens)  # (n, M)
    g = g_parent[:, None] + log_prob  # g(sa) = g(s) + log pi(a|s)
    G = perturb(g, key, G_parent[:, None]) if tau > 0 else g
    f = search_key(g, G, h_child, tau)
    best = f.argsort(dim=-1, descending=True, stable=True)[:, :count]
    columns = {
        "f": f,
        "h": h_child,
        "g": g,
        "G": G,
        "log_prob": log_prob,
        "token": tokens,
        "key": key,
    }
    return {name: column.gather(1, best) for name, column in columns.items()}


def to_host(columns):
    """{name: (n, k) float64 or int64} -> a numpy array of records (n, k), by one copy.

    The bits of the integers travel as float64, so that all columns fit into one tensor.
    Raises FloatingPointError if a key f is NaN.
    """
    dtype = [(name, "i8" if x.dtype == torch.int64 else "f8") for name, x in columns.items()]
    bits = [x.view(torch.float64) for x in columns.values()]
    packed = torch.stack(bits, dim=-1)  # (n, k, columns)
    table = packed.cpu().numpy().view(dtype)[..., 0]
    if (table["f"] != table["f"]).any():
        raise FloatingPointError(
            "the search met NaN in the model's log-probabilities or in the value head"
        )
    return table


# -------------------------------------------------------------------------------------------- Noise
#
# Every prefix has a 64-bit key, a hash of the path that leads to it:
#     key(root) = mix64(mix64(mix64(0, seed), iteration), problem);   key(sa) = mix64(key(s), a)
# The Gumbel noise at sa is a function of key(sa).

# The constants of SplitMix64 as torch.int64 holds them: all three have the sign bit set.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLY_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLY_2 = 0x94D049BB133111EB - 2**64


def shift_right(x, bits):
    """Logical shift right of int64.  (torch's own >> copies the sign.)"""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(key, a):
    """Output number `a` of the SplitMix64 generator that starts at `key` (Steele et al. 2014).

    int64 tensors that broadcast; arithmetic is modulo 2^64.
    """
    x = key + (a + 1) * _STEP
    x ^= shift_right(x, 30)  # in place: for a large vocabulary this is most of what children cost
    x *= _MULTIPLY_1
    x ^= shift_right(x, 27)
    x *= _MULTIPLY_2
    return x ^ shift_right(x, 31)


def root_keys(seed, iteration, indices, stream=0):
    """Keys of the roots, as a list.  indices: the *global* numbers of the problems.

    stream: draws for another purpose, which must be independent of the rollouts (stream 0), take
    another number.
    """
    start = mix64(torch.tensor(0), torch.tensor(seed))
    start = mix64(start, torch.tensor(iteration))
    if stream != 0:
        start = mix64(start, torch.tensor(stream))
    return mix64(start, torch.tensor(list(indices), dtype=torch.int64)).tolist()


def gumbel(key):
    """A standard Gumbel from each 64-bit key, float64: -log(-log u), u its upper 52 bits.

    u is never 0 or 1.
    """
    u = (shift_right(key, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(u))


def perturb(g, keys, G_parent):
    """Gumbel-perturbed log-probabilities of children, conditioned on their maximum.

    g (n, M): log pi of each child's whole prefix; keys (n, M) int64; G_parent (n, 1).
    Returns G (n, M), whose maximum in each row is G_parent.
    Source: Kool et al. 2019, arXiv 1903.06059, appendix B.3, the numerically stable form.
    """
    noisy = g + gumbel(keys)
    # Without the condition the maximum would be Z.  It becomes G_parent, the others are cut below
    # it:
    #     v = G_parent - noisy + log(1 - exp(noisy - Z))
    #     G = G_parent - max(0, v) - log(1 + exp(-|v|))
    Z = noisy.amax(dim=-1, keepdim=True)
    v = G_parent - noisy + torch.log(-torch.expm1(noisy - Z))
    return G_parent - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))


def log_inclusion(phi, kappa, tau):
    """log q(y): the log-probability that a leaf's key exceeds kappa, the key of the (K+1)-th leaf.

    phi = log pi(y) + h(y), in nats and *unperturbed*.  With the perturbed key here, a leaf that was
    lucky would count as one that was likely, and the estimate would be biased.
    The result is a logarithm: pi and q of a thousand tokens are both 0 in floating point, while
    pi/q is an ordinary number.  There is no q at tau = 0, nor after the queue was pruned; without a
    (K+1)-th leaf (kappa = -inf) q is 1.
    Source: Kool et al. 2020, arXiv 2002.06043.
    """
    if tau == 0 or kappa == -math.inf:
        return 0.0
    # q = 1 - exp(-exp(x)),   x = (phi - kappa)/tau
    x = (phi - kappa) / tau
    if x < -40:
        return x  # log q = x to the last digit
    return math.log(-math.expm1(-math.exp(min(x, 50.0))))


# ----------------------------------------------------------------------------------------- Sampling


@dataclass(slots=True)
class Chain:
    """One i.i.d. completion while it is written."""

    node: Node  # its prefix so far
    key: int  # hash of its path, with the number of the chain in it


def sample(keys, expand, options, greedy=False):
    """The baseline: options.K i.i.d. completions of each problem, or the one greedy completion.

    It runs on the same expander as `search`.  Chains of one problem that have written the same
    prefix share its node, so it is run once.  A leaf's `count` says how many chains ended there.
    The noise is keyed by path too: chain c of a root starts with the key mix64(key(root), -2 - c).

    Arguments and result are those of `search`.  A leaf's weight is count/K, so that the sum of
    weight * r is the sample mean.
    """
    trees = [Tree(row, key, options) for row, key in enumerate(keys)]
    K = 1 if greedy else options.K
    chain_keys = mix64(
        torch.tensor(keys, dtype=torch.int64)[:, None], -2 - torch.arange(K)
    ).tolist()
    chains = []
    for tree, own_keys in zip(trees, chain_keys):
        for key in own_keys:
            chains.append(Chain(tree.root, key))
    known = {}  # (parent, token) -> Node

    while chains:
        row_of_node = {}
        for chain in chains:
            row_of_node.setdefault(chain.node, len(row_of_node))
        log_probs, _ = ask(expand, list(row_of_node))
        rows = torch.tensor([row_of_node[chain.node] for chain in chains], device=log_probs.device)
        # The Gumbel-max trick: argmax of log pi(a|s) + Gumbel is a draw from pi(.|s).  Under h = 0
        # and tau = 1 that is the best child.  Under tau = 0 it is the most probable token.
        table = top_children_fast(
            log_probs[rows],
            h=torch.zeros(len(chains), 1, device=log_probs.device),
            parents=[(0.0, 0.0, chain.key) for chain in chains],
            tau=0 if greedy else 1,
            count=1,
        )[:, 0]
        drawn = zip(table["token"].tolist(), table["log_prob"].tolist(), table["key"].tolist())
        unfinished = []
        for chain, (token, log_prob, key) in zip(chains, drawn):
            parent = chain.node
            node = known.get((parent, token))
            if node is None:
                node = sampled_node(parent, token, log_prob, options)
                known[parent, token] = node
                if node.is_leaf:
                    trees[node.problem].leaves.append(node)
            if node.is_leaf:
                node.count += 1
                node.weight = node.count / K
            else:
                unfinished.append(Chain(node, key))
        chains = unfinished

    for tree in trees:
        tree.stopped = "sampled"
        tree.mass = sum(math.exp(leaf.g) for leaf in tree.leaves)
    return trees


def sampled_node(parent, token, log_prob, options):
    """The node below `parent` that a chain reaches by `token`; no chain has ended there yet."""
    g = parent.g + log_prob
    depth = parent.depth + 1
    node = Node(parent.problem, parent, token, depth, f=g, g=g, G=g, log_prob=log_prob, count=0)
    node.mark_leaf(options)
    return node


# --------------------------------------------------------------------- The KV-cached language model


class NodeCache(Cache):
    """K and V of every node in one table a layer; attention gathers each node's ancestors from it.

    The table has a row a token: the prompt tokens of each problem once, then one row a node.
    Before a forward, `write` says to which rows the new tokens go, and `read` which rows each
    sequence attends to, by position.  So no prefix is run twice, and siblings share all of their
    K/V.  A node costs a copy that grows with its depth and not with the tree.  Row 0 is for
    padding.

    The alternative is one cache whose time axis is the node index, under a 4D mask.  A forward then
    pays for all nodes of a problem.  It took 1.2 times as long as gathering at 128 nodes a problem,
    1.8 times at 256, 2.1 at 512 and 12 at 1,024 (one round of 64 problems with 2 new nodes each at
    depth 48, the tiny base's shape, 2 cores).
    """

    def __init__(self):
        super().__init__(layers=[])
        self.tables = {}  # (layer, "K" or "V") -> (rows, H * D)
        self.rows = 1
        self.write = None  # (n * T,) rows of the new tokens
        self.read = None  # (n * L,) rows that each sequence attends to

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by each layer's attention: store new K and V (n, H, T, D), return (n, H, L, D)."""
        keys = self.write_and_gather((layer_idx, "K"), key_states)
        values = self.write_and_gather((layer_idx, "V"), value_states)
        return keys, values

    def write_and_gather(self, name, new):
        """Store `new` (n, H, T, D) in the rows `write`; return the rows `read` as (n, H, L, D)."""
        n, H, T, D = new.shape
        table = self.tables.get(name)
        if table is None:
            table = new.new_zeros(1, H * D)
        table = grow_table(table, self.rows)
        self.tables[name] = table
        by_token = new.transpose(1, 2).reshape(n * T, H * D)
        table.index_copy_(0, self.write, by_token)
        gathered = table.index_select(0, self.read)  # (n * L, H * D)
        return gathered.view(n, -1, H, D).transpose(1, 2)

    def get_seq_length(self, layer_idx=0):
        """Always 0: positions and masks are given explicitly, so no length may be derived."""
        return 0


def grow_table(table, rows):
    """The table (rows, ...) if it is long enough, else a copy twice as long as asked.

    Doubling makes growth cheap.  On a CPU, rows that were never written take no memory.
    """
    if len(table) >= rows:
        return table
    grown = table.new_empty(max(2 * rows, 1024), *table.shape[1:])
    grown[: len(table)] = table
    return grown


def pad_rows(lists, width, pad=0, dtype=torch.int64, device=None):
    """Lists of numbers -> a tensor (len(lists), width), each padded on the right."""
    rows = [[*numbers, *[pad] * (width - len(numbers))] for numbers in lists]
    return torch.tensor(rows, dtype=dtype, device=device).view(len(rows), width)


class Expander:
    """expand(nodes) for `search` and `sample` on a causal language model: one token a node.

    model: any Hugging Face causal LM that check_model accepts.
    prompts: N lists of token ids.
    value_function(hidden (n, D)) -> (V (n,), h (n,) in nats): the value head.  None: both are 0.

    A node that was run before answers from its stored hidden state.  `forwards` counts the calls of
    the model, `spent` the model tokens of each problem.
    """

    def __init__(self, model, prompts, max_new_tokens, value_function=None):
        check_eval_mode(model)
        self.backbone = model.base_model
        self.lm_head = model.get_output_embeddings()
        self.device = model.device
        self.dtype = next(model.parameters()).dtype
        self.value_function = value_function
        self.prompts = prompts
        longest_prompt = max((len(prompt) for prompt in prompts), default=1)
        self.span = longest_prompt + max_new_tokens  # longest path in tokens
        self.cache = NodeCache()
        # What is kept of each row of the cache: the rows of the path that ends here, by position (0
        # beyond its end), the last hidden state, and V.
        D = self.lm_head.weight.shape[1]
        self.ancestors = torch.zeros(1, self.span, dtype=torch.int32, device=self.device)
        self.hidden = torch.zeros(1, D, dtype=self.dtype, device=self.device)
        self.values = torch.zeros(1, device=self.device)
        self.forwards = 0
        self.spent = [0] * len(prompts)

    @torch.no_grad()
    def __call__(self, nodes):
        """Returns log pi(.|s) (n, V) float32 and h(s) (n, 1): all children inherit it."""
        # Roots first and alone: theirs is a forward on prompts, the others' one on single tokens.
        new_roots = [node for node in nodes if node.slot is None and node.parent is None]
        if new_roots:
            self.run_model(new_roots)
        new_nodes = [node for node in nodes if node.slot is None]
        if new_nodes:
            self.run_model(new_nodes)
        slots = torch.tensor([node.slot for node in nodes], device=self.device)
        hidden = self.hidden[slots]  # (n, D)
        log_probs = F.log_softmax(self.lm_head(hidden).float(), dim=-1)
        if self.value_function is None:
            V, h = torch.zeros(2, len(nodes), device=self.device)
        else:
            V, h = self.value_function(hidden)
        self.values[slots] = V.float()
        return log_probs, h[:, None]

    def run_model(self, nodes):
        """One forward on what each node adds to its parent's path; sets the nodes' slots.

        All nodes are roots, or none is.  A root adds its prompt, any other node its one token.
        """
        new_tokens, new_rows, starts, parents, lasts, slots = [], [], [], [], [], []
        for node in nodes:
            prompt = self.prompts[node.problem]
            if node.parent is None:
                added, parent_slot, start = prompt, 0, 0
            else:
                added, parent_slot = [node.token], node.parent.slot
                start = len(prompt) + node.depth - 1
            first_row = self.cache.rows
            self.cache.rows += len(added)
            node.slot = self.cache.rows - 1
            new_tokens.append(added)
            new_rows.append(range(first_row, self.cache.rows))
            starts.append(start)
            parents.append(parent_slot)
            lasts.append(len(added) - 1)
            slots.append(node.slot)
            self.spent[node.problem] += len(added)
        self.ancestors = grow_table(self.ancestors, self.cache.rows)
        self.hidden = grow_table(self.hidden, self.cache.rows)
        self.values = grow_table(self.values, self.cache.rows)

        # A copy from the host waits until a GPU has done all that it was given.  So there are only
        # two, and they come before the forward.
        n, T = len(nodes), max(lasts) + 1
        tokens, write = pad_rows(new_tokens + new_rows, T, device=self.device).view(2, n, T)
        numbers = torch.tensor([starts, parents, lasts, slots], device=self.device)
        start, parent, last, slot = numbers  # each (n,)
        positions = start[:, None] + torch.arange(T, device=self.device)  # (n, T)
        path = self.ancestors[parent]
        path.scatter_(1, positions, write.int())  # (n, span): the parent's path, then the new rows
        L = max(starts) + T
        self.cache.write = write.reshape(-1)
        self.cache.read = path[:, :L].reshape(-1)

        out = self.backbone(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self.causal_mask(positions, L),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state  # (n, T, D)
        self.forwards += 1

        self.ancestors[slot] = path
        self.hidden[slot] = out[torch.arange(n, device=self.device), last]

    def causal_mask(self, positions, L):
        """(n, 1, T, L): 0 where a token at `positions` (n, T) may look, very negative elsewhere.

        A token sees its path and itself.  Padding lies to the right of every real token, so no real
        token sees it.  The mask is additive and of float type: eager attention adds it, SDPA takes
        it, and neither falls back on its own causal mask.
        """
        hidden = torch.arange(L, device=self.device) > positions[:, :, None]  # (n, T, L)
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(hidden, torch.finfo(self.dtype).min)
        return mask[:, None]


# ----------------------------------------------------------------------------------------- Rollouts


@dataclass
class Rollouts:
    """What a search or sampling returns: B completions, padded on the right.

    One grid everywhere: index t of a (B, T-1) column is about the token at t+1 of `tokens` (B, T).
    Masks come from lengths and never from token ids, so EOS is trained.
    """

    tokens: torch.Tensor  # (B, T) prompt, completion, padding
    prompt_length: torch.Tensor  # (B,)
    length: torch.Tensor  # (B,) prompt and completion
    problem: torch.Tensor  # (B,) row of the problem in its batch
    log_probs: torch.Tensor  # (B, T-1) log pi_old of each token, as the search saw it
    values: torch.Tensor  # (B, T-1) V of the prefix before each token
    log_pi: torch.Tensor  # (B,) log pi of the completion
    weight: torch.Tensor  # (B,) pi/q, or count/K for samples
    count: torch.Tensor  # (B,) draws that ended here; 1 for a search
    f: torch.Tensor  # (B,) search key
    truncated: torch.Tensor  # (B,) bool
    prefix: torch.Tensor  # (B, T-1) row of `hidden` that belongs to the prefix before each token
    hidden: torch.Tensor  # (M, D) last hidden states of the M distinct prefixes; row 0 is padding
    extra: dict = field(default_factory=dict)  # columns (B,) or (B, T-1) that training adds
    stats: dict = field(default_factory=dict)

    @property
    def mask(self):
        """(B, T-1) True where t+1 is a token of the completion."""
        t = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_length[:, None]) & (t < self.length[:, None])

    def __len__(self):
        return self.tokens.shape[0]

    def columns(self):
        """{name: tensor} of the fields that have a row a rollout, without `extra`."""
        names = [f.name for f in fields(self) if f.name not in ("hidden", "extra", "stats")]
        return {name: getattr(self, name) for name in names}

    def select(self, rows, device="cpu"):
        """The rollouts of these rows, cut to the longest of them, on a device."""
        T = int(self.length[rows].max())
        columns = {}
        for name, column in self.columns().items():
            width = T if name == "tokens" else T - 1
            columns[name] = select_rows(column, rows, width).to(device)
        extra = {}
        for name, column in self.extra.items():
            extra[name] = select_rows(column, rows, T - 1).to(device)
        return Rollouts(**columns, hidden=self.hidden, extra=extra, stats=self.stats)

    def distinct_prefixes(self):
        """(hidden (M, D) of the M distinct prefixes of these rollouts, their row of it (B, T-1)).

        Both are on the device of the columns.  `hidden` itself stays on the CPU, whole.
        """
        kept, row = self.prefix.unique(return_inverse=True)
        return self.hidden[kept.cpu()].to(self.prefix.device), row

    def completions(self):
        """Token ids of each completion, EOS included, as lists."""
        bounds = zip(self.tokens.tolist(), self.prompt_length.tolist(), self.length.tolist())
        return [tokens[start:end] for tokens, start, end in bounds]


def select_rows(column, rows, width):
    """These rows of a column (B,), or of a grid (B, T) cut to `width`."""
    if column.ndim == 2:
        return column[rows, :width]
    return column[rows]


def collect(trees, expander, pad=0):
    """Trees of `search` or `sample` -> Rollouts on the CPU, a row a leaf, by problem.

    The leaves of a problem are in the order in which they were accepted.
    pad: the token behind the end of shorter rows.  No mask depends on it, so None (the pad token of
    a tokenizer that has none) stands for 0.
    There may be no leaf at all, if a search has met its bounds.
    """
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    tokens, log_probs, slots, prompt_lengths, lengths = [], [], [], [], []
    for leaf in leaves:
        prompt = expander.prompts[leaf.problem]
        path = leaf.path_nodes()
        # The grids (B, T-1) have no entry for the first token, so the prompt takes one less.
        before = [0] * (len(prompt) - 1)
        tokens.append(prompt + [node.token for node in path])
        log_probs.append(before + [node.log_prob for node in path])
        slots.append(before + [node.parent.slot for node in path])  # the prefix before each token
        prompt_lengths.append(len(prompt))
        lengths.append(len(prompt) + leaf.depth)
    T = max(lengths, default=expander.span)
    slots = pad_rows(slots, T - 1)
    # Leaves share prefixes, so each distinct one is kept once; slot 0 is padding.
    kept = torch.cat([torch.zeros(1, dtype=torch.int64), slots.flatten()]).unique()
    return Rollouts(
        tokens=pad_rows(tokens, T, pad=0 if pad is None else pad),
        prompt_length=torch.tensor(prompt_lengths, dtype=torch.int64),
        length=torch.tensor(lengths, dtype=torch.int64),
        problem=torch.tensor([leaf.problem for leaf in leaves], dtype=torch.int64),
        log_probs=pad_rows(log_probs, T - 1, dtype=torch.float32),
        values=expander.values.cpu()[slots] * (slots > 0),
        log_pi=torch.tensor([leaf.g for leaf in leaves], dtype=torch.float32),
        weight=torch.tensor([leaf.weight for leaf in leaves], dtype=torch.float32),
        count=torch.tensor([leaf.count for leaf in leaves], dtype=torch.int64),
        f=torch.tensor([leaf.f for leaf in leaves], dtype=torch.float32),
        truncated=torch.tensor([leaf.truncated for leaf in leaves], dtype=torch.bool),
        prefix=torch.searchsorted(kept, slots),
        hidden=expander.hidden[kept.to(expander.hidden.device)].cpu(),
        stats={
            "model_tokens": sum(expander.spent),
            "forwards": expander.forwards,
            "pops": sum(tree.pops for tree in trees),
            "mass": sum(tree.mass for tree in trees),
            "pruned": sum(tree.pruned for tree in trees),
            "stopped": Counter(tree.stopped for tree in trees),
        },
    )


def concatenate(parts):
    """One Rollouts from several, padded to the longest of them; stats are added up."""
    T = max(part.tokens.shape[1] for part in parts)
    columns = {}
    for name in parts[0].columns():
        width = T if name == "tokens" else T - 1
        rows = []
        for part in parts:
            column = getattr(part, name)
            if column.ndim == 2:
                column = F.pad(column, (0, width - column.shape[1]))
            rows.append(column)
        columns[name] = torch.cat(rows)
    # All tables of hidden states share their first row, which is padding.  The others follow.
    tables = [parts[0].hidden[:1]]
    rows_before = []  # of each rollout, the rows of the tables before its own
    for part in parts:
        rows_before += [sum(len(table) for table in tables) - 1] * len(part)
        tables.append(part.hidden[1:])
    shift = torch.tensor(rows_before, dtype=torch.int64)[:, None]
    columns["prefix"] += shift * (columns["prefix"] > 0)
    columns["hidden"] = torch.cat(tables)
    stats = dict(parts[0].stats)
    for part in parts[1:]:
        for name, number in part.stats.items():
            stats[name] = stats[name] + number  # a Counter adds up by key
    return Rollouts(**columns, stats=stats)


# ------------------------------------------------------------------------------ One text, completed


def complete(
    model,
    tokenizer,
    prompt,
    K=4,
    *,
    max_new_tokens=64,
    max_nodes=1024,
    tau=0.0,
    stop=(),
    value_function=None,
    seed=0,
):
    """K completions of a text by A* search, as a Tree: its `leaves`, in the order they were found.

    Printed, the tree is a list of its leaves; in a notebook it is drawn.

    K, max_new_tokens, max_nodes, tau: bounds and temperature, as in Options.
    stop: a list of texts that end a completion, beside the end tokens of model and tokenizer.
    value_function: as in Expander.  seed: of the noise at tau > 0.
    What the tokenizer does not know of the prompt it may leave out, as always.
    Raises ValueError if the model cannot serve the search of this prompt, if the prompt has no
    tokens, and for a bound or a temperature that makes no sense.
    """
    stops_are_texts = isinstance(stop, (list, tuple)) and all(isinstance(s, str) for s in stop)
    if not isinstance(prompt, str) or not stops_are_texts or "" in stop:
        raise ValueError("the prompt is one text, and stop is a list of texts that are not empty")
    if min(K, max_new_tokens, max_nodes) < 1 or not 0 <= tau <= 1:
        raise ValueError("K, max_new_tokens and max_nodes are 1 or more, and tau lies in [0, 1]")
    prompts = [encode_prompt(tokenizer, prompt)]
    longest = len(prompts[0]) + max_new_tokens
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and longest > context:
        raise ValueError(
            f"the prompt ({len(prompts[0])} tokens) plus max_new_tokens {max_new_tokens} does not "
            f"fit into the model's context of {context} tokens"
        )
    check_model(model, longest)
    end = getattr(model.generation_config, "eos_token_id", None)  # one id, several or None
    ends = {tokenizer.eos_token_id, *(end if isinstance(end, (list, tuple)) else [end])}
    options = Options(
        eos=tuple(ends - {None}),
        stop=StopTexts(tokenizer, stop, prompts),
        K=K,
        tau=tau,
        width=2,
        max_new_tokens=max_new_tokens,
        max_nodes=max_nodes,
    )
    expander = Expander(model, prompts, max_new_tokens, value_function)
    (tree,) = search(root_keys(seed, 0, [0]), expander, options)
    tree.tokenizer = tokenizer
    tree.prompt = prompts[0]
    return tree


# ------------------------------------------------------------------------------------ Demonstration
#
# Tokens a, b and . (the end), at most three of them, and a policy that is a table.

LETTERS = "ab."
END = LETTERS.index(".")
# s -> pi(a|s), pi(b|s), pi(.|s)
PI = {"": (0.6, 0.3, 0.1), "a": (0.5, 0.25, 0.25), "b": (0.1, 0.8, 0.1)}
PI_DEEPER = (0.1, 0.3, 0.6)  # at every longer prefix
BETA = 1.0


def demo_reward(text):
    """1 for a completion that begins with bb, else -1."""
    return 1.0 if text.startswith("bb") else -1.0


def demo_leaves(prefix):
    """Every completion below a prefix, with its log pi from there: {text: nats}."""
    if prefix.endswith(".") or len(prefix) == 3:
        return {prefix: 0.0}
    leaves = {}
    for letter, probability in zip(LETTERS, PI.get(prefix, PI_DEEPER)):
        for text, log_prob in demo_leaves(prefix + letter).items():
            leaves[text] = math.log(probability) + log_prob
    return leaves


def demo_text(node):
    """The letters of a node."""
    return "".join(LETTERS[token] for token in node.tokens())


def zero_h(text):
    """h(s) = 0: the search is guided by log pi alone."""
    return 0.0


def exact_h(text):
    """h(s) = log E_pi[exp(r/beta) | s], in nats, by going through all completions below s."""
    terms = [math.exp(lp + demo_reward(leaf) / BETA) for leaf, lp in demo_leaves(text).items()]
    return math.log(sum(terms))


def demo_search(title, h, tau):
    """Search by h(text), print each node that is opened and each leaf.  Returns {text: leaf}."""
    opened = []

    def expand(nodes):
        opened.extend(nodes)
        pi = [PI.get(demo_text(node), PI_DEEPER) for node in nodes]
        child_h = [[h(demo_text(node) + letter) for letter in LETTERS] for node in nodes]
        return torch.tensor(pi).double().log(), torch.tensor(child_h).double()

    options = Options(eos=(END,), K=4, tau=tau, max_new_tokens=3)
    (tree,) = search(root_keys(0, 0, [0]), expand, options)
    print(f"\n{title}\n        prefix     g      G      h      f")
    for verb, nodes in (("open", opened), ("leaf", tree.leaves)):
        for i, node in enumerate(nodes, start=1):
            numbers = "".join(f"{x:7.2f}" for x in (node.g, node.G, node.h, node.f))
            print(f"{verb} {i}  {demo_text(node) or '(root)':6s}{numbers}")
    return {demo_text(leaf): leaf for leaf in tree.leaves}


def main():
    every = demo_leaves("")
    optimal = {text: log_pi + demo_reward(text) / BETA for text, log_pi in every.items()}
    for prefix, (a, b, end) in (PI | {"else": PI_DEEPER}).items():
        print(f"pi(.|{prefix or '(root)'}): a {a} b {b} . {end}")
    print(
        f"reward: 1 below bb, -1 elsewhere; beta = 1; {len(every)} completions of at most 3 tokens"
    )

    # What the file is for, asserted: the order of the leaves, first under pi, then under pi*.
    leaves = demo_search("h = 0, tau = 0: the most probable completions first", zero_h, tau=0.0)
    assert list(leaves) == sorted(every, key=every.get, reverse=True)[:4]
    leaves = demo_search(
        "exact h, tau = 0: in order of log pi + r/beta, so bb first", exact_h, tau=0.0
    )
    assert list(leaves) == sorted(every, key=optimal.get, reverse=True)[:4]

    # Draws without replacement: q is a probability, so no weight pi/q is below pi.  And G of the
    # root is the maximum over all leaves, so the first leaf has it.
    leaves = demo_search("h = 0, tau = 1: four draws without replacement; f = G", zero_h, tau=1.0)
    weights = [round(leaf.weight, 3) for leaf in leaves.values()]
    print(f"their weights pi/q, for sums that estimate E_pi: {weights}")
    assert all(math.exp(every[text]) <= leaf.weight for text, leaf in leaves.items())
    best = next(iter(leaves.values()))
    root = best.path_nodes()[0].parent
    assert abs(best.G - root.G) < 1e-12


# -------------------------------------------------------------------------------------------- Texts
#
# Texts to tokens and back, exactly, and completions that end with a text: a base model seldom
# writes EOS after its answer.


def encode_prompt(tokenizer, text):
    """The token ids of a text that a model goes on from.

    What the tokenizer adds in front, such as a BOS, stays, but is not doubled if the text begins
    with it.  What the tokenizer adds behind, such as an EOS, is dropped: the text is not finished.
    Raises ValueError if there are no tokens, or if they cannot be told from what is added.
    """
    full = tokenizer(text, padding=False, truncation=False)["input_ids"]
    plain = tokenizer(text, padding=False, truncation=False, add_special_tokens=False)["input_ids"]
    if not plain:
        raise ValueError(f"the tokenizer gives no tokens for the prompt {text!r}")

    # full = front + plain + behind
    start = 0
    while full[start : start + len(plain)] != plain:
        start += 1
        if start + len(plain) > len(full):
            raise ValueError(
                "the tokenizer cannot be used, because with its special tokens it splits the "
                f"prompt {text!r} differently"
            )
    front = full[:start]
    # The longest end of `front` that the text itself begins with is not repeated.
    for n in range(len(front), 0, -1):
        if front[-n:] == plain[:n]:
            front = front[:-n]
            break
    return front + plain


def tokens_of(tokenizer, text):
    """The token ids of a text, without what the tokenizer adds; [] if it cannot encode the text."""
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception:
        # A tokenizer without an unknown token may leave out what it does not know, or raise.
        return []


def text_of(tokenizer, ids, skip_special_tokens=False):
    """The text of token ids with its spaces as they are, and by default with special tokens."""
    return tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


@functools.lru_cache(maxsize=2**18)
def has_text(tokenizer, token, skip_special_tokens=False):
    """Does a token add anything to the decoded text?

    Not if the tokenizer does not know its id: a model's embeddings are often padded to a round
    number.  skip_special_tokens=True: a special token does not count as text either.
    """
    # The token stands between others, because some decoders strip a space at the ends of a text.
    around = tokens_of(tokenizer, "1")
    try:
        with_token = text_of(tokenizer, [*around, token, *around], skip_special_tokens)
    except Exception:
        # Most tokenizers skip an unknown id.  One that is written in Python may raise anything.
        return False
    return with_token != text_of(tokenizer, [*around, *around], skip_special_tokens)


def mark(token):
    """What stands in a completion's text for a token without text."""
    return f"<token {token}>"


def text_after(tokenizer, before, ids):
    """The text that the tokens `ids` add to that of the tokens `before`."""
    before = list(before)
    while True:
        text_before = text_of(tokenizer, before)
        text = text_of(tokenizer, before + ids)
        if text.startswith(text_before):
            return text[len(text_before) :]
        # A byte can change the character in front of it: decoders with byte fallback (Llama)
        # replace a whole run of bytes by U+FFFD if it is not UTF-8.  Then the last token before is
        # left out, until the text before stays as it was.  At worst `ids` are decoded alone.
        before.pop()


@dataclass(frozen=True)
class TextEnd:
    """The end of a completion's text, as far as the text of the next token depends on it."""

    before: list  # the last tokens whose text is settled
    open: list  # tokens after them: they end in a part of a character
    text: str  # the end of the settled text


class StopTexts:
    """For Options.stop: a completion ends with the token that completes one of some texts.

    tokenizer: of transformers.  texts: such as ("</answer>",); without any, nothing is decoded.
    prompts: the token ids of each problem, as the Expander has them.

    The text must lie in what the model writes; what the prompt ends with does not count.  It may be
    spread over any tokens, and the last of them may go on after it.
    """

    def __init__(self, tokenizer, texts, prompts):
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        self.prompts = prompts
        # Characters of earlier tokens that can belong to a stop text.
        self.overlap = max((len(text) for text in self.texts), default=1) - 1

    def __call__(self, node):
        """Does the token of this node complete a stop text?  Keeps the end of its text in it."""
        if not self.texts:
            return False
        end = node.parent.text_end
        if end is None:  # the parent is the root
            end = TextEnd(before=self.prompts[node.problem], open=[], text="")
        before, ids = end.before, [*end.open, node.token]
        if has_text(self.tokenizer, node.token):
            text = end.text + text_after(self.tokenizer, before, ids)
            before = ids
        else:
            text = end.text + mark(node.token)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            # A part of a character: the next token decides which character it is.
            node.text_end = TextEnd(before=end.before, open=ids, text=end.text)
        else:
            start = max(0, len(text) - self.overlap)
            node.text_end = TextEnd(before=before, open=[], text=text[start:])
        return any(stop in text for stop in self.texts)


# -------------------------------------------------------------------- Can the search serve a model?
#
# Checks that a program makes once, at its start; the algorithm is complete above.  They keep models
# out for which log pi would silently be wrong.


def check_eval_mode(model):
    """Raise ValueError if the model is in training mode: dropout would make log pi random."""
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")


def check_model(model, longest=None, training=False):
    """Raise ValueError, naming the model type, unless the search reproduces the model's own log pi.

    longest: most tokens that a prompt and its completion have together in this run; None: as many
        as the model's context has, at most 256.
    training: True if the update will run the model in training mode.

    The model is in eval mode.  Probes look for what is known to go wrong: a cache or mask of
    another kind, recurrent layers, a scaled or capped output layer, attention that changes with
    length, and randomness in training mode.
    """
    check_eval_mode(model)
    refuse = f"the model type {model.config.model_type} cannot serve the search"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{refuse}: it is an encoder-decoder, not a causal language model")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{refuse}: it has no output layer")
    tokens = probe_tokens(model, 3)
    # One prompt first, then two of unequal length, which need padding.
    one_prompt = probe_failure(model, prompts=[tokens[:2]], K=1)
    failure = one_prompt or probe_failure(model, prompts=[tokens[:2], tokens[2:]], K=2)
    if failure:
        layers = sorted(set(getattr(model.config, "layer_types", None) or ()))
        kinds = f"; its layers are of {' and '.join(layers)}" if layers else ""
        raise ValueError(f"{refuse}: {failure}{kinds}")
    if longest is None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = min(context or 256, 256)
    check_lengths(model, longest, refuse)
    if training and not training_error(model, longest) < tolerance(model):
        raise ValueError(
            f"the model type {model.config.model_type} computes another log pi in training mode, "
            "which --gradient-checkpointing on needs: leave it off"
        )


def check_lengths(model, longest, refuse):
    """Raise ValueError if the model attends differently from some length below `longest` on.

    Attention windows, chunks and rescaled positions begin at a length.  Nearly always it is a
    number of the config, so there is a probe just past each of these.  The last probe is as long as
    the run needs.
    """
    keys = config_numbers(model.config)
    exact = 3  # the longest length that has passed so far: check_model has tried it
    lengths = {number for number in keys if exact < number < longest}
    lengths.add(max(exact, longest - 2))
    for length in sorted(lengths):
        failure = length_failure(model, length)
        if failure is None:
            exact = length
            continue
        failing = length
        while failing - exact > 1:  # bisection, for a failure that begins at one length
            middle = (exact + failing) // 2
            if length_failure(model, middle):
                failing = middle
            else:
                exact = middle
        source = f" ({' or '.join(keys[failing])} in its config)" if failing in keys else ""
        raise ValueError(
            f"{refuse} beyond {failing} tokens{source}, where {failure}: the longest prompt plus "
            f"--max-new-tokens must stay within {failing}, and is {longest}"
        )


def config_numbers(config):
    """Every whole number in a model's config and in its parts: {number: [keys that hold it]}."""
    keys = {}
    entries = list(config.to_dict().items())
    for key, entry in entries:  # the list grows while it is read
        if isinstance(entry, dict):
            entries.extend(entry.items())
        elif isinstance(entry, (list, tuple)):
            entries.extend((key, part) for part in entry)
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool) and entry % 1 == 0:
            known = keys.setdefault(int(entry), [])
            if key not in known:
                known.append(key)
    return keys


def probe_tokens(model, count):
    """`count` random token ids, always the same, as a list."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return (mix64(torch.tensor(0), torch.arange(count)) % vocabulary).tolist()


def length_failure(model, length):
    """probe_failure of a prompt one token below `length`, whose completion goes past it.

    A short prompt beside it is padded: a model may place a window by the end of the padding.
    """
    tokens = probe_tokens(model, length - 1)
    return probe_failure(model, prompts=[tokens, tokens[:2]], K=1)


def probe_failure(model, prompts, K):
    """What is wrong with a model on these prompts, as a clause; None if nothing is."""
    try:
        error = probe_error(model, prompts, K)
    except Exception as failure:  # a model that is not made for the search may raise anything
        text = str(failure).strip() or "no message"
        first_line = text.splitlines()[0][:160]
        return f"it fails on the search's cache and mask ({type(failure).__name__}: {first_line})"
    if not error < tolerance(model):  # so written that a NaN is refused too
        return "its log pi with the search's cache and mask is not that of a plain forward"
    return None


def tolerance(model):
    """Largest difference of log pi that is rounding, in nats, under spread_logits."""
    full_precision = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return 0.01 if full_precision else 1.0


@torch.no_grad()
def probe_error(model, prompts, K):
    """Largest difference of log pi between the search and plain forwards, over all tokens.

    K completions of each prompt are written, of three random tokens each.  The log pi of each next
    token must be that of a plain forward of prompt and completion, alone.  And this forward must
    agree with one of its first few tokens.
    """
    expander = Expander(model, prompts, max_new_tokens=3)
    searched = {}  # node -> log pi of its children (V,)

    def expand(nodes):
        log_probs, h = expander(nodes)
        searched.update(zip(nodes, log_probs))
        return torch.zeros_like(log_probs), h  # all tokens are drawn alike, so completions differ

    differences = []
    with spread_logits(model):
        trees = sample(range(len(prompts)), expand, Options(eos=(), K=K, max_new_tokens=3))
        for leaf in [leaf for tree in trees for leaf in tree.leaves]:
            tokens = torch.tensor(prompts[leaf.problem] + leaf.tokens()[:-1], device=model.device)
            plain = model(tokens[None], use_cache=False).logits[0]  # (T, V)
            # The same on the first tokens alone: no position may depend on what follows.
            first = model(tokens[None, :8], use_cache=False).logits[0]
            by_search = torch.stack([searched[node.parent] for node in leaf.path_nodes()])  # (3, V)
            differences.append(by_search - F.log_softmax(plain[-3:].float(), dim=-1))
            differences.append((first - plain[:8]).float())
    return torch.cat(differences).abs().max().item()


@torch.no_grad()
def training_error(model, longest):
    """Largest difference of the logits between training mode and eval mode, in a plain forward.

    Up to 256 tokens are run, because noise in a router may change only few of them.
    """
    T = min(longest, 64)
    tokens = torch.tensor(probe_tokens(model, 4 * T), device=model.device).view(4, T)
    with spread_logits(model):
        expected = model(tokens, use_cache=False).logits
        model.train()
        trained = model(tokens, use_cache=False).logits
        model.eval()
    return (trained - expected).abs().max().item()


@contextlib.contextmanager
def spread_logits(model):
    """Inside, the output layer multiplies its logits to a standard deviation of 20.

    The logits of fresh weights are near 0.  There the difference that a cap, a window or a position
    makes could not be told from rounding.
    """
    scale = None

    def spread(module, inputs, logits):
        nonlocal scale
        if scale is None:  # one scale for all calls
            scale = 20.0 / max(logits.float().std(dim=-1).mean().item(), 1e-6)
        return logits * scale

    hook = model.get_output_embeddings().register_forward_hook(spread)
    try:
        yield
    finally:
        hook.remove()


# -------------------------------------------------- Children of a large vocabulary: an optimisation
#
# What follows changes no result.  The noise of all 150,000 tokens in float64 would cost half as
# much as the model.  So all tokens are scored roughly, in float32, and only the best few exactly.


def top_children_fast(log_probs, h, parents, tau, count):
    """top_children, by way of `screen_tokens` where that is possible: the same records.

    It is possible at tau = 0 or 1 when all children of a node have one h.  Then their order is that
    of log pi (tau = 0) or of log pi + Gumbel (tau = 1).
    """
    V = log_probs.shape[1]
    if count + 16 >= V or tau not in (0, 1) or h.shape[1] != 1:
        return top_children(log_probs, h, parents, tau, count)
    keys = torch.tensor([key for _, _, key in parents], device=log_probs.device)
    tokens, certain = screen_tokens(log_probs, keys, tau, count)
    columns = score_children(log_probs, h, tokens, parents, tau, count)
    columns["certain"] = certain[:, None].expand(-1, count).long()  # by the same copy to the host
    table = to_host(columns)
    if not table["certain"].all():  # a tie, or too close to one: look at all tokens exactly
        return top_children(log_probs, h, parents, tau, count)
    return table


def screen_tokens(log_probs, keys, tau, count):
    """Tokens that can be among each row's `count` best, and whether they surely hold all of these.

    The order is by log pi (tau = 0) or by log pi + Gumbel (tau = 1).
    log_probs (n, V), V > count + 16; keys (n,) of the parents.
    Returns tokens (n, count + 16), ascending; and (n,) True where no other token can be so good.
    """
    score = rough_scores(log_probs, keys) if tau > 0 else log_probs.float()
    best, tokens = score.topk(count + 16)
    tokens = tokens.sort(dim=1).values
    exact = log_probs.gather(1, tokens).double()
    if tau > 0:
        exact += gumbel(mix64(keys[:, None], tokens))
    # The worst rough score among those kept bounds all others, but for float32's rounding, which is
    # less than what is added here.
    bound = best[:, -1:].double() * (1 - 1e-6) + 1e-4
    certain = (exact > bound).sum(dim=1) >= count
    return tokens, certain | bound[:, 0].isneginf()


def rough_scores(log_probs, keys):
    """log pi + Gumbel of all tokens (n, V), in float32, in pieces that stay in the CPU's cache."""
    n, V = log_probs.shape
    device = log_probs.device
    numbers = 1 << 16 if device.type == "cpu" else 1 << 24  # of a piece
    size = max(1, numbers // n)
    score = torch.empty_like(log_probs, dtype=torch.float32)
    for start in range(0, V, size):
        end = min(start + size, V)
        key = mix64(keys[:, None], torch.arange(start, end, device=device))
        # The Gumbel is -log(-log u).  float32 cannot hold a u near 1, where large Gumbels come
        # from.  It holds v = 1 - u, computed from the flipped bits and rounded down; u = 1 - v.
        v = shift_right(~key, 12).float()
        noise = (v * -(2.0**-52 - 2.0**-75)).log1p_().neg_().log_()
        score[:, start:end] = log_probs[:, start:end] - noise
    return score


# ------------------------------------------------------------------------------ How a tree is shown


def headline(tree):
    """What a search did, such as '4 leaves, 68 nodes opened; stopped: leaves'."""
    leaves = f"{len(tree.leaves)} {'leaf' if len(tree.leaves) == 1 else 'leaves'}"
    return f"{leaves}, {tree.pops} nodes opened; stopped: {tree.stopped or 'not yet'}"


def on_one_line(text):
    """The text with its new lines shown as \\n."""
    return text.replace("\n", "\\n")


def leaf_line(tree, leaf):
    """The text of a leaf on one line, and whether the limit has cut it."""
    return on_one_line(tree.text(leaf)) + ("  (cut off)" if leaf.truncated else "")


def list_leaves(tree):
    """The leaves of a tree, one a line, in the order they were found: what repr(tree) prints."""
    lines = [headline(tree), "  weight   log pi        h        f  text"]
    for leaf in tree.leaves:
        numbers = f"{leaf.weight:8.3f} {leaf.g:8.2f} {leaf.h:8.2f} {leaf.f:8.2f}"
        lines.append(f"{numbers}  {leaf_line(tree, leaf)}")
    return "\n".join(lines)


def draw_outline(tree, most=60):
    """The tree as an outline in HTML: tokens in a row until paths part.  For notebooks.

    Leaves are bold.  The first `most` leaves are drawn, and of the other nodes that the model was
    run on as many, the best by f.
    """
    leaves = tree.leaves[:most]
    inner = [node for node in tree.nodes.values() if node.children is not None]
    ends = leaves + heapq.nlargest(most, inner, key=operator.attrgetter("f"))
    below = {tree.root: []}  # node -> its children that are drawn
    for end in ends:
        for node in end.path_nodes():
            if node not in below:
                below[node] = []
                below[node.parent].append(node)

    def draw(node):
        """The list item of the path from `node` to where it parts or ends, with what is below."""
        start = node
        while len(below[node]) == 1 and node not in leaves:
            (node,) = below[node]
        # What the text of the parent holds already is left out.  (All of it, unless it ends in half
        # a letter.)
        text = tree.text(node)
        shown = "" if start is tree.root else tree.text(start.parent)
        text = on_one_line(text[len(os.path.commonprefix([shown, text])) :])
        text = html.escape(text) or "&#8729;"  # the root where paths part at once
        numbers = f"log pi {node.g:.2f}, h {node.h:.2f}"
        if node in leaves:
            text = f"<b>{text}</b>"
            numbers += f", weight {node.weight:.3f}"
        parts = sorted(below[node], key=operator.attrgetter("f"), reverse=True)
        deeper = "".join(draw(child) for child in parts)
        lists = f"<ul>{deeper}</ul>" if deeper else ""
        code = f"<code style='white-space:pre'>{text}</code>"
        return f"<li>{code} <small style='color:gray'>{numbers}</small>{lists}</li>"

    return f"<p>{html.escape(headline(tree))}</p><ul>{draw(tree.root)}</ul>"


if __name__ == "__main__":
    main()
