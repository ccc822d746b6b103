"""astar_search.py -- token-level A* search over KV-cached prefixes: the rollouts of A*PO.

A rollout is a path in the tree of token sequences below a prompt.  Write s for a prefix of the completion, pi for the
policy, r in [r_lo, r_hi] for the reward of a finished completion, beta for a temperature.  Under the KL-regularised
optimum pi*(y|x) ~ pi(y|x) exp(r(y)/beta) a prefix has the probability

    log pi*(s|x) = log pi(s|x) + V*(s)/beta - V*(x)/beta          V*(s) = beta log E_{y ~ pi(.|s)} exp(r(y)/beta)
                   `--- g(s) --'  `- h(s) -'

so best-first search by f = g + h opens prefixes in the order in which the optimal policy would like them.  g and h are
both in nats.  f never rises along a path (soft Bellman equation), hence with the exact h the leaves come out in exact
order of log pi(y) + r(y)/beta.  A learned h is neither exact nor a bound: then this is a heuristic search.

*Stochastic* search (tau = 1) replaces g by a perturbed one, so that the leaves are draws and not just the top:

    G(root) ~ Gumbel(0);   G(s) = max over the leaves y below s of log pi(y) + Gumbel(y), drawn from the root down
    key = (1 - tau) g + tau G + h                                 tau = 0: plain A*;   tau = 1: Gumbel search

The K best leaves by key are then K draws *without replacement* from exp((log pi + h)/tau): from pi if h is constant
(stochastic beam search, Kool et al. 2019, arXiv 1903.06059), from pi* if a leaf's h is r/beta and every inner h is a
bound (A* sampling, Maddison et al. 2014, arXiv 1411.0030).  With the soft value as guide the set is approximate.

Departures from the literature: h is *deferred* (every child inherits the h of the node that was expanded, so that a
node costs one model token, like a sampled one; one step stale), and a problem may stop once its leaves cover a given
mass of pi.  The noise is a hash of the path, not a stream of random numbers: a rollout does not depend on the width,
on the other problems of the batch, or on the rank that runs it, and no random state has to be saved.

In this file, in reading order: noise, children, tree, search, sampling, the KV-cached language model, Rollouts.

    python astar_search.py     # a small search, printed so that it can be checked by hand
    python astar_search.py --prompt "34*12=" --tree out.html     # a search by a model, drawn; --help for its flags
"""

import heapq
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

# ====================================================================================================== noise
# key(root) = mix64(mix64(mix64(0, seed), iteration), problem);  key(sa) = mix64(key(s), a);  the Gumbel at sa is a function
# of key(sa).
# The constants of SplitMix64 as torch.int64 holds them: all three have the sign bit set.
_STEP, _MULTIPLY_1, _MULTIPLY_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x, bits):
    """Logical shift right of int64 (torch's own >> copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(key, a):
    """SplitMix64 (Steele et al. 2014): output number a of the generator that starts at `key`.  int64 tensors that
    broadcast, arithmetic modulo 2^64."""
    x = key + (a + 1) * _STEP
    x ^= _shift(x, 30)  # in place: with a large vocabulary this is most of what children cost
    x *= _MULTIPLY_1
    x ^= _shift(x, 27)
    x *= _MULTIPLY_2
    return x ^ _shift(x, 31)


def root_keys(seed, iteration, indices):
    """Keys of the roots: seed and iteration are integers, indices the *global* problem numbers.  Returns a list."""
    start = mix64(mix64(torch.tensor(0), torch.tensor(seed)), torch.tensor(iteration))
    return mix64(start, torch.tensor(list(indices), dtype=torch.int64)).tolist()


def gumbel(key):
    """A standard Gumbel from each 64-bit key, float64: -log(-log u) of its upper 52 bits, u never 0 or 1."""
    u = (_shift(key, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(u))


# =================================================================================================== children
def perturb(g, keys, G_parent):
    """Gumbel-perturbed log-probabilities of children, conditioned on their maximum being the parent's.

    g (n, V): log pi of each child's whole prefix; keys (n, V) int64; G_parent (n, 1).  Returns G (n, V) with
    max over V equal to G_parent.  Kool et al. 2019, appendix B.3, the numerically stable form.
    """
    noisy = g + gumbel(keys)
    # the unconditioned maximum Z becomes G_parent, all else is truncated below it:
    #   v = G_parent - noisy + log(1 - exp(noisy - Z));   G = G_parent - max(0, v) - log(1 + exp(-|v|))
    Z = noisy.amax(dim=-1, keepdim=True)
    v = G_parent - noisy + torch.log(-torch.expm1(noisy - Z))
    return G_parent - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))


def contenders(logp, keys, tau, count):
    """Tokens that can be among each row's `count` best by log pi (tau = 0) or by log pi + Gumbel (tau > 0).

    logp (n, V); keys (n,) of the parents.  Returns tokens (n, M), ascending, M a little above count or V; and (n,) True
    where surely no other token can.  Exact noise for all of a large vocabulary would cost half as much as the model, so
    all are scored in float32, in pieces that stay in the processor's cache, and only the best M are looked at closely.
    """
    n, V = logp.shape
    M, device = count + 16, logp.device
    if M >= V:
        return torch.arange(V, device=device).expand(n, V), torch.ones(n, dtype=torch.bool, device=device)
    score, size = logp.float(), max(1, (1 << 16 if device.type == "cpu" else 1 << 24) // n)
    if tau > 0:
        score = torch.empty_like(score)
        for piece in (slice(start, min(start + size, V)) for start in range(0, V, size)):
            # The Gumbel -log(-log u) by v = 1 - u, rounded down: float32 holds a small v, that is, a large Gumbel.
            v = _shift(~mix64(keys[:, None], torch.arange(piece.start, piece.stop, device=device)), 12).float()
            score[:, piece] = logp[:, piece] - (v * -(2.0**-52 - 2.0**-75)).log1p_().neg_().log_()
    best, tokens = score.topk(M)
    tokens = tokens.sort(dim=1).values
    exact = logp.gather(1, tokens).double()
    if tau > 0:
        exact += gumbel(mix64(keys[:, None], tokens))
    bound = best[:, -1:].double() * (1 - 1e-6) + 1e-4  # on all other tokens; what is added is more than the rounding
    return tokens, ((exact > bound).sum(dim=1) >= count) | bound[:, 0].isneginf()


# What the host is told of a child: its search key, h, g, G, log pi(token|parent), hash; is its place among all certain?
CHILD = [(name, "f8") for name in ("f", "h", "g", "G", "logp")] + [(name, "i8") for name in ("token", "key", "certain")]


def best_children(logp, h, parents, tau, block, screen=True):
    """The best `block` children of n nodes by search key, best first; ties: the smaller token first.

    logp (n, V) log pi(a|s); h (n, V) or (n, 1) in nats; parents: n tuples (g, G, key).  Returns a numpy array of
    records CHILD (n, block), f = -inf where a node has no such child.  One copy from the device to the host, whatever n
    is.  screen=False: look at all V children closely.  Raises FloatingPointError at a NaN.
    """
    n, V = logp.shape
    assert h.shape in ((n, V), (n, 1)), f"expand must return h (n, V) or (n, 1), not {tuple(h.shape)}"
    block = min(block, V)
    state = torch.tensor([parent[:2] for parent in parents], dtype=torch.float64, device=logp.device)
    keys = torch.tensor([parent[2] for parent in parents], dtype=torch.int64, device=logp.device)
    # With one h for all children their order is that of log pi (tau = 0) or log pi + Gumbel (tau = 1), else that of f.
    simple = screen and tau in (0, 1) and h.shape == (n, 1)
    tokens, certain = contenders(logp, keys, tau, block if simple else V)  # (n, M)
    # Keys are compared across the whole tree: float64, or two leaves of a long search could swap places.
    step, h_child = logp.gather(1, tokens).double(), h.double().expand(n, V).gather(1, tokens)
    child_keys = mix64(keys[:, None], tokens)
    g = state[:, :1] + step  # g(sa) = g(s) + log pi(a|s)
    G = perturb(g, child_keys, state[:, 1:]) if tau > 0 else g
    f = G + h_child if tau == 1 else (1 - tau) * g + tau * G + h_child  # f = (1 - tau) g + tau G + h
    f = torch.where(g.isneginf(), -math.inf, f)  # impossible children (and no 0 * inf)
    best = f.argsort(dim=-1, descending=True, stable=True)[:, :block]
    integers = torch.stack([tokens, child_keys, certain[:, None].expand_as(tokens).long()]).view(torch.float64)
    columns = [x.gather(1, best) for x in (f, h_child, g, G, step, *integers)]
    table = torch.stack(columns, dim=-1).cpu().numpy().view(CHILD)[..., 0]  # the one copy
    if (table["f"] != table["f"]).any():
        raise FloatingPointError("the search met NaN in the model's log-probabilities or in the value head")
    if not table["certain"].all():  # a tie, or too close to one
        return best_children(logp, h, parents, tau, block, screen=False)
    return table


# ======================================================================================================= tree
@dataclass(eq=False, slots=True)
class Node:
    """A prefix.  `parent is None` at the root, which stands for the prompt."""

    problem: int  # row of the batch
    parent: "Node | None"
    token: int
    depth: int  # tokens of the completion up to here
    f: float  # the search key
    h: float  # nats
    g: float  # log pi of the prefix
    G: float  # g perturbed
    logp: float  # log pi of the last token
    key: int  # hash of the path
    rank: int = 0  # place among its siblings by f
    leaf: bool = False
    truncated: bool = False  # a leaf because max_new_tokens cut it, not by EOS
    children: object = None  # records CHILD, best first; None until the node has been evaluated
    complete: bool = False  # children lists all of them
    slot: int | None = None  # where its K/V lies in the cache
    count: int = 1  # draws that ended here (sampling)
    weight: float = 1.0  # pi/q of an accepted leaf

    def nodes(self):
        """The nodes from the first token of the completion to this one, as a list."""
        node, found = self, []
        while node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    def path(self):
        """Tokens of the completion up to here, as a list."""
        return [node.token for node in self.nodes()]

    def end(self, options):
        """Mark the node as a leaf if its token ends the completion, or the limit cuts it there."""
        ended = self.token in options.eos
        self.truncated = not ended and self.depth >= options.max_new_tokens
        self.leaf = ended or self.truncated

    def __lt__(self, other):  # heapq asks this only if two keys are equal: ties break by path
        return self.path() < other.path()


class Tree:
    """The search of one problem: a priority queue of prefixes, and the leaves accepted so far, in order."""

    def __init__(self, problem, key, options):
        G = gumbel(torch.tensor(key)).item()  # G(root) ~ Gumbel(0)
        self.root = Node(problem, None, -1, 0, f=math.inf, h=0.0, g=0.0, G=G, logp=0.0, key=key)
        self.options = options
        self.queue = [(-math.inf, self.root)]  # heapq pops the smallest: the queue holds -f
        self.leaves = []
        self.pops = 0  # inner nodes expanded
        self.mass = 0.0  # sum of pi over the leaves
        self.pruned = False
        self.done = False  # options.done said so of the last leaf
        self.stopped = None  # why the search ended

    def push_child(self, parent, rank):
        """Queue the child of `parent` that is number `rank` by f.  A node queues its best child when it is popped, and
        its next sibling: the queue stays short, and no child is ever out of reach."""
        if rank >= len(parent.children):
            return
        f, h, g, G, logp, token, key, _ = parent.children.item(rank)
        node = Node(parent.problem, parent, token, parent.depth + 1, f, h, g, G, logp, key, rank)
        node.end(self.options)
        heapq.heappush(self.queue, (-f, node))
        return node

    def missing(self, node):
        """Nodes that the model must run before `node` may be popped: itself, or its parent for more siblings."""
        wanted = []
        if not node.leaf and node.children is None:
            wanted.append(node)
        if node.parent is not None and node.rank + 1 == len(node.parent.children) and not node.parent.complete:
            wanted.append(node.parent)
        return wanted

    def wanted(self):
        """What to evaluate in the next round: the best min(width, K - accepted) entries of the queue, so far as they
        lack something.  Speculation only: evaluating more than the head changes what is known, never what is popped."""
        width = min(self.options.width, max(1, self.options.K - len(self.leaves)), len(self.queue))
        best = [heapq.heappop(self.queue) for _ in range(width)]
        for entry in best:
            heapq.heappush(self.queue, entry)
        return dict.fromkeys(node for _, entry in best for node in self.missing(entry))  # a set in a fixed order

    def advance(self):
        """Replay the width-1 search as far as it is evaluated: while the head of the queue is known, pop it; a leaf is
        accepted, an inner node gives way to its best child.  Sets `stopped` when the search has ended."""
        options = self.options
        while True:
            # The weights need the key of leaf K+1.  At tau = 1 the head of the queue has it (for a constant h: G is the
            # maximum below a prefix); for 0 < tau < 1 it is only a bound, so search on until the head is that leaf.
            if self.done:
                self.stopped = "done"
            elif len(self.leaves) >= options.K and (
                options.tau == 0 or options.tau == 1 or not self.queue or self.queue[0][1].leaf
            ):
                self.stopped = "leaves"
            elif self.mass >= options.cover:
                self.stopped = "covered"
            elif not self.queue:
                self.stopped = "exhausted"
            elif self.pops >= options.max_nodes and not self.queue[0][1].leaf:
                self.stopped = "max_nodes"
            if self.stopped or self.missing(self.queue[0][1]):
                return
            node = heapq.heappop(self.queue)[1]  # the largest f
            if node.leaf:
                self.leaves.append(node)
                self.mass += math.exp(node.g)
                self.done = options.done is not None and options.done(node)
            else:
                self.pops += 1
                self.push_child(node, 0)
            if node.parent is not None:
                self.push_child(node.parent, node.rank + 1)
            if len(self.queue) > options.max_open:  # beam: forget all but the best
                self.queue = heapq.nsmallest(options.max_open, self.queue)
                self.pruned = True

    def weigh_leaves(self):
        """Importance weights pi/q of the accepted leaves; sum of (pi/q) r is then unbiased for E_pi[r] (Kool et al.
        2020, arXiv 2002.06043), exactly so for a constant h and a search that ended at K leaves: not by covered mass, by
        options.done or by max_nodes.  Where q is void (log_inclusion) they are pi, scaled where all of it would underflow."""
        kappa = -self.queue[0][0] if self.queue else -math.inf  # the best key left behind
        tau, void = self.options.tau, self.pruned or self.options.tau == 0
        scale = min(0.0, max((leaf.g for leaf in self.leaves), default=0.0) + 60.0)
        for leaf in self.leaves:
            leaf.weight = math.exp(leaf.g - (scale if void else log_inclusion(leaf.g + leaf.h, kappa, tau)))


def log_inclusion(phi, kappa, tau):
    """log q(y), the chance that a leaf's key beats kappa, the key of the (K+1)-th leaf.

    phi = log pi(y) + h(y), *unperturbed*: with the perturbed key here a lucky leaf would be its own excuse.  Void if
    the queue was pruned, and at tau = 0, where nothing is random.  In logs, because pi and q of a thousand tokens are
    both 0 in floating point, while pi/q is a number like any other.
    """
    if tau == 0 or kappa == -math.inf:
        return 0.0
    # q = 1 - exp(-exp(x)), x = (phi - kappa)/tau
    x = (phi - kappa) / tau
    return x if x < -40 else math.log(-math.expm1(-math.exp(min(x, 50.0))))


# ===================================================================================================== search
@dataclass(frozen=True)
class Options:
    """Bounds and temperature of a search.  K: leaves wanted.  width: nodes of one problem evaluated at once."""

    eos: tuple  # token ids that end a completion
    K: int = 8
    tau: float = 1.0
    width: int = 1
    max_new_tokens: int = 64
    max_nodes: int = 1 << 30
    max_open: int = 1 << 30
    cover: float = math.inf  # stop once the leaves hold this much of pi
    done: Callable | None = None  # leaf -> True: stop with it.  It may know the reward: for training only


def search(keys, expand, options, kind=Tree):
    """Best-first search of N problems in lock-step.  Knows no model.

    keys: N root keys (root_keys);  expand(nodes) -> (log pi of the children (n, V), their h in nats (n, V) or (n, 1)),
    where a node may be asked again for further children;  options: Options;
    kind: Tree, or a subclass of it that watches.
    Returns N Trees with `leaves` in the order accepted, `stopped`, `pops`.  Leaves, their order and the pops do not
    depend on options.width or on the other problems: only what was evaluated ahead does.
    """
    trees = [kind(row, key, options) for row, key in enumerate(keys)]
    while True:
        nodes = [node for tree in trees if not tree.stopped for node in tree.wanted()]
        if not nodes:
            break
        logp, h = expand(nodes)  # one round: one forward, one copy to the host
        # K + 1 children are enough under a constant h; a node that is asked again gets as many more.
        block = options.K + 1 + max(0 if node.children is None else len(node.children) for node in nodes)
        table = best_children(logp, h, [(node.g, node.G, node.key) for node in nodes], options.tau, block)
        for node, rows, n in zip(nodes, table, (table["f"] > -math.inf).sum(axis=1).tolist()):
            node.children, node.complete = rows[:n], n < block or n == logp.shape[1]
        for tree in trees:
            if not tree.stopped:
                tree.advance()
    for tree in trees:
        tree.weigh_leaves()
    return trees


# =================================================================================================== sampling
def sample(keys, expand, options, greedy=False):
    """The baseline: options.K i.i.d. completions a problem (or the one greedy completion), on the same expander.

    Chains of one problem that have written the same prefix share its node, so it is run once; `count` says how many
    chains ended in a leaf.  Noise by path too: chain c of a root has the key mix64(key(root), -2 - c).
    Returns Trees like search; a leaf's weight is count/K, so that the sum of weight * r is the sample mean.
    """
    trees = [Tree(row, key, options) for row, key in enumerate(keys)]
    K = 1 if greedy else options.K
    chains = mix64(torch.tensor(keys, dtype=torch.int64)[:, None], -2 - torch.arange(K)).view(-1).tolist()  # their keys
    at = [tree.root for tree in trees for _ in range(K)]  # the node where each chain is
    children = {}  # (parent, token) -> Node
    while at:
        rows = {node: row for row, node in enumerate(dict.fromkeys(at))}
        logp, _ = expand(list(rows))
        mine = torch.tensor([rows[node] for node in at], device=logp.device)
        # the Gumbel-max trick: argmax of log pi(a|s) + Gumbel is a draw from pi(.|s); under h = 0 it is the best child
        parents, h = [(0.0, 0.0, key) for key in chains], torch.zeros(len(at), 1, device=logp.device)
        best = best_children(logp[mine], h, parents, 0 if greedy else 1, block=1)[:, 0]
        still = []  # chains that go on: where they are, their keys
        for parent, step, token, key in zip(at, *(best[name].tolist() for name in ("logp", "token", "key"))):
            node = children.get((parent, token))
            if node is None:
                g = parent.g + step
                node = Node(parent.problem, parent, token, parent.depth + 1, g, 0.0, g, g, step, key=0, count=0)
                node.end(options)
                children[parent, token] = node
                if node.leaf:
                    trees[node.problem].leaves.append(node)
            if node.leaf:
                node.count += 1
                node.weight = node.count / K
            else:
                still.append((node, key))
        at, chains = zip(*still) if still else ((), ())
    for tree in trees:
        tree.stopped = "sampled"
        tree.mass = sum(math.exp(leaf.g) for leaf in tree.leaves)
    return trees


# ============================================================================= the KV-cached language model
def with_room(table, rows):
    """The table (rows, ...) if it is long enough, else a copy twice as long as asked, so that growing stays cheap; on a
    CPU, what is not yet written takes no memory."""
    if len(table) >= rows:
        return table
    grown = table.new_empty(max(2 * rows, 1024), *table.shape[1:])
    grown[: len(table)] = table
    return grown


class NodeCache(Cache):
    """K and V of every node in one table a layer, and each forward's attention gathers a node's ancestors from it.

    The table has a row a token: prompt tokens once a problem, then one row a node.  Before a forward, `write` says to
    which rows the new tokens go and `read` which rows each sequence attends to, by position.  So no prefix is run
    twice, siblings share all of their K/V, and a node costs a copy that grows with its depth, not with the tree.
    Row 0 is for padding.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.tables = {}  # (layer, "K" or "V") -> (rows, H * D)
        self.rows = 1
        self.write = self.read = None  # (n, T) and (n, L) rows

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """What each layer's attention calls: writes new K and V (n, H, T, D), returns those of `read` (n, H, L, D)."""
        found = []
        for name, new in (("K", key_states), ("V", value_states)):
            n, H, T, D = new.shape
            table = self.tables.get((layer_idx, name), new.new_zeros(1, H * D))
            table = self.tables[layer_idx, name] = with_room(table, self.rows)
            table.index_copy_(0, self.write.reshape(-1), new.transpose(1, 2).reshape(n * T, H * D))
            found.append(table.index_select(0, self.read.reshape(-1)).view(n, -1, H, D).transpose(1, 2))
        return found

    def get_seq_length(self, layer_idx=0):
        """Always 0: positions and masks are given explicitly, nothing may be derived from a length."""
        return 0


class Expander:
    """expand(nodes) for `search` and `sample` on a causal language model: one forward a call, one token a node.

    model: any Hugging Face causal LM that check_model accepts.  prompts: N lists of token ids.
    value(hidden (n, D)) -> (V (n,), h (n,)): the value head; None for h = 0 (then values are 0).
    A node that was run before answers from its stored hidden state.  Counts `forwards` and the model tokens `spent`.
    """

    def __init__(self, model, prompts, max_new_tokens, value=None):
        self.backbone, self.lm_head, self.device = model.base_model, model.get_output_embeddings(), model.device
        self.dtype = next(model.parameters()).dtype
        self.value, self.prompts = value, prompts
        self.span = max(map(len, prompts), default=1) + max_new_tokens  # longest path in tokens
        self.cache = NodeCache()
        # By row of the cache: the rows of the path that ends here, by position (0 beyond), the last hidden state, V.
        self.ancestors = torch.zeros(1, self.span, dtype=torch.int64, device=self.device)
        self.hidden = torch.zeros(1, self.lm_head.weight.shape[1], dtype=self.dtype, device=self.device)
        self.values = torch.zeros(1, device=self.device)
        self.forwards, self.spent = 0, [0] * len(prompts)  # model tokens run for each problem

    @torch.no_grad()
    def __call__(self, nodes):
        """Returns log pi(.|s) (n, V) float32 and h(s) (n, 1): every child inherits the h of its parent."""
        fresh = [node for node in nodes if node.slot is None]
        for some in ([node for node in fresh if node.parent is None], [node for node in fresh if node.parent]):
            if some:
                self._run(some)
        slots = torch.tensor([node.slot for node in nodes], device=self.device)
        hidden = self.hidden[slots]
        logp = F.log_softmax(self.lm_head(hidden).float(), dim=-1)
        V, h = self.value(hidden) if self.value else torch.zeros(2, len(nodes), device=self.device)
        self.values[slots] = V.float()
        return logp, h[:, None]

    def _run(self, nodes):
        """Run what each node adds to its parent's path: a root its prompt (padded on the right), another its token."""
        added, rows, facts = [], [], []
        for node in nodes:
            prompt = self.prompts[node.problem]
            added.append([node.token] if node.parent else prompt)
            rows.append(range(self.cache.rows, self.cache.rows + len(added[-1])))
            self.cache.rows = rows[-1].stop
            start = len(prompt) + node.depth - 1 if node.parent else 0
            facts.append((node.parent.slot if node.parent else 0, start, len(added[-1]) - 1))
            node.slot = rows[-1][-1]
            self.spent[node.problem] += len(added[-1])
        self.ancestors, self.hidden, self.values = (
            with_room(table, self.cache.rows) for table in (self.ancestors, self.hidden, self.values)
        )

        T = max(map(len, added))
        padded = lambda lists: torch.tensor([[*x, *[0] * (T - len(x))] for x in lists], device=self.device)
        tokens, write = padded(added), padded(rows)  # (n, T)
        parent, start, last = torch.tensor(facts, device=self.device).T
        positions = start[:, None] + torch.arange(T, device=self.device)
        path = self.ancestors[parent].scatter_(1, positions, write)  # (n, span)
        L = max(start for _, start, _ in facts) + T
        self.cache.write, self.cache.read = write, path[:, :L]
        # Each token sees its path and itself; padding lies to the right of all that count.  An additive float mask:
        # eager attention adds it, SDPA takes it, and neither may guess from is_causal.
        hidden_from = torch.arange(L, device=self.device) > positions[:, :, None]  # (n, T, L)
        mask = torch.zeros(hidden_from.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(hidden_from, torch.finfo(self.dtype).min)
        out = self.backbone(
            input_ids=tokens, position_ids=positions, attention_mask=mask[:, None],  # (n, 1, T, L)
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        self.forwards += 1
        slot, each = write.gather(1, last[:, None])[:, 0], torch.arange(len(nodes), device=self.device)
        self.ancestors[slot], self.hidden[slot] = path, out[each, last]


def check_model(model):
    """Raise ValueError, naming the model type, unless the search's forward reproduces the model's own logits; the model
    is in eval mode.

    One probe catches all that could be wrong: a cache or mask of another kind, attention windows, recurrent layers,
    a scaled or capped output layer.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    refuse = f"the model type {kind} cannot serve the search"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{refuse}: it is an encoder-decoder, not a causal language model")
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"{refuse}: it has layers of {', '.join(sorted(kinds))}, not full attention")
    try:
        vocabulary = model.get_output_embeddings().weight.shape[0]
        ids = [(7 * i + 3) % vocabulary for i in range(6)]
        expander = Expander(model, [ids[:4], ids[4:]], max_new_tokens=4)  # ragged on purpose
        rollouts = collect(sample([1, 2], expander, Options(eos=(), K=2, max_new_tokens=4)), expander)
        with torch.no_grad():
            plain = F.log_softmax(model(rollouts.tokens.to(model.device)).logits[:, :-1].float(), dim=-1).cpu()
        wrong = plain.gather(2, rollouts.tokens[:, 1:, None])[..., 0] - rollouts.logprobs
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{refuse}: {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}") from None
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.25
    if not wrong[rollouts.mask].abs().max() < tolerance:
        raise ValueError(f"{refuse}: its logits with the search's cache and mask differ from those of a plain forward")


# =================================================================================================== Rollouts
@dataclass
class Rollouts:
    """What a search or sampling returns: B completions, padded on the right.  One grid: index t of everything
    (B, T-1) is about the token at t+1 of `tokens`.  Masks come from lengths, never from token ids: EOS is trained."""

    tokens: torch.Tensor  # (B, T) prompt, completion, padding
    prompt_length: torch.Tensor  # (B,)
    length: torch.Tensor  # (B,) prompt and completion
    problem: torch.Tensor  # (B,) row of the problem in its batch
    logprobs: torch.Tensor  # (B, T-1) log pi_old of each token, as the search saw it
    values: torch.Tensor  # (B, T-1) V of the prefix before each token
    log_pi: torch.Tensor  # (B,) log pi of the completion
    weight: torch.Tensor  # (B,) pi/q, or count/K for samples
    count: torch.Tensor  # (B,) draws that ended here; 1 for a search
    f: torch.Tensor  # (B,) search key
    truncated: torch.Tensor  # (B,) bool
    extra: dict = field(default_factory=dict)  # columns (B,) or (B, T-1) that training adds: rewards, advantages, ...
    stats: dict = field(default_factory=dict)

    @property
    def mask(self):
        """(B, T-1) True where t+1 is a token of the completion."""
        t = torch.arange(1, self.tokens.shape[1], device=self.tokens.device)
        return (t >= self.prompt_length[:, None]) & (t < self.length[:, None])

    def __len__(self):
        return self.tokens.shape[0]

    def columns(self):
        """{name: tensor} of what has a row a rollout, without `extra`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("extra", "stats")}

    def select(self, rows, device="cpu"):
        """The rollouts of these rows, cut to their longest, on a device."""
        T = int(self.length[rows].max())
        grid = lambda x: x[rows, : T if x is self.tokens else T - 1] if x.ndim == 2 else x[rows]
        cut = lambda columns: {name: grid(x).to(device) for name, x in columns.items()}
        return Rollouts(**cut(self.columns()), extra=cut(self.extra), stats=self.stats)

    def completions(self):
        """Token ids of each completion, EOS included, as lists."""
        bounds = zip(self.tokens.tolist(), self.prompt_length.tolist(), self.length.tolist())
        return [row[start:end] for row, start, end in bounds]


def collect(trees, expander, pad=0):
    """Trees of search or sample -> Rollouts on the CPU, problem by problem, leaves in the order accepted."""
    leaves = [leaf for tree in trees for leaf in tree.leaves]  # may be none: a search can end within its bounds without
    paths, prompts = [leaf.nodes() for leaf in leaves], [expander.prompts[leaf.problem] for leaf in leaves]
    T = max((len(prompt) + leaf.depth for prompt, leaf in zip(prompts, leaves)), default=expander.span)

    def column(fact, dtype=torch.float32):
        return torch.tensor(list(map(fact, leaves)), dtype=dtype)

    def grid(width, before, fact, after=0, dtype=torch.float32):
        """(B, width): what comes `before`, of each prompt, then a fact of each node of the path, then padding."""
        rows = [[*before(prompt), *map(fact, path)] for prompt, path in zip(prompts, paths)]
        return torch.tensor([row + [after] * (width - len(row)) for row in rows], dtype=dtype).view(len(rows), width)

    blank = lambda prompt: [0] * (len(prompt) - 1)
    slots = grid(T - 1, blank, lambda node: node.parent.slot, dtype=torch.int64)
    prompt_length = column(lambda leaf: len(expander.prompts[leaf.problem]), torch.int64)
    return Rollouts(
        tokens=grid(T, list, lambda node: node.token, pad, torch.int64),
        prompt_length=prompt_length,
        length=prompt_length + column(lambda leaf: leaf.depth, torch.int64),
        problem=column(lambda leaf: leaf.problem, torch.int64),
        logprobs=grid(T - 1, blank, lambda node: node.logp),
        values=expander.values.cpu()[slots] * (slots > 0),
        log_pi=column(lambda leaf: leaf.g),
        weight=column(lambda leaf: leaf.weight),
        count=column(lambda leaf: leaf.count, torch.int64),
        f=column(lambda leaf: leaf.f),
        truncated=column(lambda leaf: leaf.truncated, torch.bool),
        stats={"model_tokens": sum(expander.spent), "forwards": expander.forwards}
        | {name: sum(getattr(tree, name) for tree in trees) for name in ("pops", "mass", "pruned")}
        | {"stopped": Counter(tree.stopped for tree in trees)},
    )


def join(parts):
    """One Rollouts from several, padded to their longest; stats are added up."""
    T = max(part.tokens.shape[1] for part in parts)
    joined = {}
    for name in parts[0].columns():
        rows = [part.columns()[name] for part in parts]
        if rows[0].ndim == 2:
            rows = [F.pad(row, (0, (T if name == "tokens" else T - 1) - row.shape[1])) for row in rows]
        joined[name] = torch.cat(rows)
    add = lambda name: sum((part.stats[name] for part in parts), type(parts[0].stats[name])())
    return Rollouts(**joined, stats={name: add(name) for name in parts[0].stats})


# ======================================================================================================= demo
def main(argv=()):
    """Tokens a, b and . (the end), at most three of them.  Small enough to check every number with a pencil."""
    if argv:  # flags: the picture of a search by a model
        from experiments import tree

        return tree.main(argv)
    letters, eos, beta = "ab.", 2, 1.0
    pi = {"": (0.6, 0.3, 0.1), "a": (0.5, 0.25, 0.25), "b": (0.1, 0.8, 0.1)}  # pi(a|s), pi(b|s), pi(.|s)
    deeper = (0.1, 0.3, 0.6)
    reward = lambda text: 1.0 if text.startswith("bb") else -1.0
    name = lambda node: "".join(letters[token] for token in node.path())

    def leaves_below(text):
        """Every completion below a prefix with its log pi from there."""
        if text.endswith(".") or len(text) == 3:
            return {text: 0.0}
        return {leaf: math.log(chance) + logp for letter, chance in zip(letters, pi.get(text, deeper))
                for leaf, logp in leaves_below(text + letter).items()}  # fmt: skip

    def exact_h(text):  # h(s) = log E_pi[exp(r/beta) | s]
        return math.log(sum(math.exp(logp + reward(leaf) / beta) for leaf, logp in leaves_below(text).items()))

    def show(title, guide, tau):
        """The search of one problem by h = guide(text), printed.  Returns its leaves by text."""
        opened = []

        def expand(nodes):
            opened.extend(nodes)
            h = [[guide(name(node) + letter) for letter in letters] for node in nodes]
            return torch.tensor([pi.get(name(node), deeper) for node in nodes]).double().log(), torch.tensor(h).double()

        (tree,) = search(root_keys(0, 0, [0]), expand, Options(eos=(eos,), K=4, tau=tau, max_new_tokens=3))
        print(f"\n{title}\n        prefix     g      G      h      f")
        for verb, nodes in (("open", opened), ("leaf", tree.leaves)):
            for i, node in enumerate(nodes, start=1):
                numbers = "".join(f"{x:7.2f}" for x in (node.g, node.G, node.h, node.f))
                print(f"{verb} {i}  {name(node) or '(root)':6s}{numbers}")
        return {name(leaf): leaf for leaf in tree.leaves}

    every = leaves_below("")
    optimal = {text: logp + reward(text) / beta for text, logp in every.items()}
    for s, (a, b, end) in (pi | {"else": deeper}).items():
        print(f"pi(.|{s or '(root)'}): a {a} b {b} . {end}")
    print(f"reward: 1 below bb, -1 elsewhere; beta = 1; {len(every)} completions of at most 3 tokens")

    # What the file is for, asserted: the order of the leaves, here under pi, there under pi*.
    leaves = show("h = 0, tau = 0: the most probable completions first, right or wrong", lambda text: 0.0, tau=0.0)
    assert list(leaves) == sorted(every, key=every.get, reverse=True)[:4]
    leaves = show("exact h, tau = 0: in order of log pi + r/beta, so bb first", exact_h, tau=0.0)
    assert list(leaves) == sorted(every, key=optimal.get, reverse=True)[:4]
    leaves = show("h = 0, tau = 1: four draws from pi without replacement; f = G", lambda text: 0.0, tau=1.0)
    print(f"their weights pi/q, for sums that estimate E_pi: {[round(leaf.weight, 3) for leaf in leaves.values()]}")
    assert all(math.exp(every[text]) <= leaf.weight for text, leaf in leaves.items())  # q is a chance
    best = next(iter(leaves.values()))
    assert abs(best.G - best.nodes()[0].parent.G) < 1e-12  # G(root) is the maximum over all leaves


if __name__ == "__main__":
    main(sys.argv[1:])
