"""A picture of one search: which prefixes it opened, in what order, and why.

    python astar_search.py --prompt "34*12=" --tree out.html      # all of it, with a slider over the rounds
    python astar_search.py --prompt "34*12=" --tree out.md        # the same in Mermaid, cut to what Mermaid can hold

The page is one file that needs no network: tree.html beside this file, with the record of the search as JSON in it.
The record is made by a Tree that watches itself (WatchedTree); the search does not know.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import astar_search  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import policy  # noqa: E402
import reward as reward_module  # noqa: E402
from experiments import run_folder  # noqa: E402

# ====================================================================================================== record

STOPPED = {
    "leaves": "stopped by --K",
    "covered": "stopped by --cover",
    "max_nodes": "stopped by --max-nodes",
    "exhausted": "ended by an empty queue",
}


class WatchedTree(astar_search.Tree):
    """A search that remembers in which round each node was queued, run, popped or pruned.  A round is one forward of
    the model and the pops that follow from it; the root is queued in round 0."""

    def __init__(self, *args):
        super().__init__(*args)
        self.round = 0
        self.queued = {self.root: 0}  # node -> round, in the order of the events, as in the other three
        self.run, self.popped, self.dropped = {}, {}, {}

    def wanted(self):
        nodes = super().wanted()
        self.round += 1
        for node in nodes:
            self.run.setdefault(node, self.round)  # a node may be asked again, for more siblings: it was run before
        return nodes

    def push_child(self, parent, rank):
        # Whatever is popped comes by here at once: an inner node when its best child is queued, a leaf, the last of
        # `leaves`, when its next sibling is.
        for node in [parent] * (rank == 0) + self.leaves[-1:]:
            self.popped.setdefault(node, self.round)
        node = super().push_child(parent, rank)
        if node:
            self.queued[node] = self.round
        return node

    def advance(self):
        super().advance()
        if self.pruned:
            kept = {node for _, node in self.queue}
            for node in self.queued.keys() - self.popped.keys() - kept:
                self.dropped.setdefault(node, self.round)


def visible(text):
    """A token as it can be shown on one line: space as an open box, what does not print as its escape."""
    shown = {" ": "\u2423", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(shown.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def record(tree, prompt, token_text, verdicts=None):
    """A finished WatchedTree as a dict for JSON: facts of the search, its nodes in the order queued, and the places in
    that list of those that were popped, in the order popped.

    token_text(id) -> str;  verdicts: what the reward says of each leaf, dicts, or None.  Of a node: parent (its place in
    `nodes`), token, id, depth, rank among its siblings, logp, g, G, h, f (absent at the root), the rounds queued, run,
    popped and dropped so far as they happened; order, its number among the expanded nodes; of an accepted leaf
    `accepted`, its number among the leaves, and its weight.
    """
    place = {node: i for i, node in enumerate(tree.queued)}
    order = {node: n for n, node in enumerate((node for node in tree.popped if not node.leaf), start=1)}
    accepted = {leaf: n for n, leaf in enumerate(tree.leaves, start=1)}
    nodes = []
    for node in tree.queued:
        row = {"token": visible(prompt), "parent": None}
        if node.parent is not None:
            row = {"token": visible(token_text(node.token)), "parent": place[node.parent], "id": node.token}
            row |= {name: getattr(node, name) for name in ("depth", "rank", "logp", "g", "G", "h", "f")}
        for name in ("queued", "run", "popped", "dropped"):
            row[name] = getattr(tree, name).get(node)
        row |= {"order": order.get(node), "leaf": node.leaf or None, "truncated": node.truncated or None}
        if node in accepted:
            row |= {"accepted": accepted[node], "weight": node.weight}
            row |= verdicts[accepted[node] - 1] if verdicts else {}
        nodes.append({name: x for name, x in row.items() if x is not None})
    return {
        "prompt": visible(prompt),
        "K": tree.options.K,
        "tau": tree.options.tau,
        "rounds": tree.round,
        "why": STOPPED[tree.stopped],
        "pruned": tree.pruned,
        "popped": [place[node] for node in tree.popped],
        "nodes": nodes,
    }


# ================================================================================================== two formats


def page(facts):
    """The HTML page.  In JSON, < is written as an escape: no token can end the script element that holds it."""
    blob = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
    return (pathlib.Path(__file__).parent / "tree.html").read_text(encoding="utf-8").replace("RECORD", blob, 1)


MERMAID_NODES, MERMAID_TEXT = 400, 45_000  # it refuses more than 500 edges or 50,000 characters
CLASSES = {
    "expanded": "fill:#dbe7f7,stroke:#3567a8,color:#1b1f24",
    "open": "fill:#ffffff,stroke:#6b727c,color:#1b1f24,stroke-dasharray:4 3",
    "pruned": "fill:#eeeeee,stroke:#9aa0a8,color:#5a6068,stroke-dasharray:1 3",
    "right": "fill:#d3f0d8,stroke:#1a7f37,color:#1b1f24,stroke-width:3px",
    "wrong": "fill:#fde3dc,stroke:#b5371b,color:#1b1f24,stroke-width:3px",
    "leaf": "fill:#ece2fa,stroke:#7042b5,color:#1b1f24,stroke-width:3px",
}
SHAPES = {"expanded": '["{}"]', "open": '("{}")', "pruned": '("{}")'}  # and a leaf: (["..."])


def state(node):
    """What became of a node, by the end: a key of CLASSES."""
    if "accepted" in node:
        return {True: "right", False: "wrong", None: "leaf"}[node.get("correct")]
    return "expanded" if "order" in node else "pruned" if "dropped" in node else "open"


def label(node, numbers):
    """The token, with its number among the expanded nodes or the leaves; then the numbers of the search, by name."""
    text = node["token"] if len(node["token"]) <= 24 else node["token"][:23] + "\u2026"
    # All but letters and digits as a character code: quotes, brackets, pipes, backticks and # would end something.
    text = "".join(c if c.isalnum() else f"#{ord(c)};" for c in text)
    kind = state(node)
    sign = {"right": "\u2713 leaf {accepted}", "wrong": "\u2717 leaf {accepted}", "leaf": "leaf {accepted}",
            "expanded": "({order})"}.get(kind, kind).format(**node)  # fmt: skip
    lines = [f"{sign} {text}"]
    if "f" in node:
        lines.append(" ".join(f"{name} {node[name]:.2f}" for name in numbers))
    if "accepted" in node:
        reward = f"reward {node['reward']:.1f} " if "reward" in node else ""
        lines.append(f"{reward}weight {node['weight']:.3g}")
    return "<br/>".join(lines)


def mermaid(facts):
    """Markdown with one Mermaid flowchart, cut to MERMAID_NODES and MERMAID_TEXT: the paths to the accepted leaves, then
    nodes as they were expanded, then the queue by f."""
    nodes, chosen = facts["nodes"], {}

    def take(i):
        path = []
        while i is not None and i not in chosen:
            path.append(i)
            i = nodes[i].get("parent")
        chosen.update(dict.fromkeys(reversed(path)))

    last = len(nodes)
    keys = [(n.get("accepted", last), n.get("order", last), -n.get("f", math.inf)) for n in nodes]
    for i in sorted(range(last), key=keys.__getitem__):
        take(i)
    lines, shown = [], list(chosen)[:MERMAID_NODES]
    for i in shown:
        kind = state(nodes[i])
        box = SHAPES.get(kind, '(["{}"])').format(label(nodes[i], "fgGh" if facts["tau"] > 0 else "fgh"))
        lines.append(f"  n{nodes[i]['parent']} --> n{i}{box}:::{kind}" if i else f"  n0{box}:::{kind}")
    while sum(map(len, lines)) > MERMAID_TEXT:
        lines.pop()
    cut = f"all {last} prefixes that it queued."
    if len(lines) < last:
        cut = (f"{len(lines)} of the {last} prefixes that it queued, for Mermaid holds no more: the paths to the accepted "
               "leaves, then the others in the order expanded, then the best of the queue.")  # fmt: skip
    return "\n".join([
        f"A search of {facts['rounds']} rounds ({facts['why']}): {cut}",
        "(n): expanded as number n; dashed: still open; leaf n: accepted as number n, \u2713 right, \u2717 wrong.",
        "",
        "```mermaid",
        "flowchart LR",
        *lines,
        *(f"  classDef {kind} {CLASSES[kind]}" for kind in dict.fromkeys(state(nodes[i]) for i in shown)),
        "```",
        "",
    ])  # fmt: skip


# ================================================================================================ command line


def truth(prompt, answer):
    """(the right number or None, the prefill): of `34*12=` or `34*12=<think>`, or of any prompt with an answer given."""
    question = prompt.removesuffix("<think>")
    product = re.fullmatch(r"\s*(\d{1,9})\s*\*\s*(\d{1,9})\s*=\s*", question)
    if answer is None and product:
        answer = int(product[1]) * int(product[2])
    return answer, prompt[len(question) :]


def write(path, text):
    """Written aside and renamed: a reader sees the old file or the new one.  Raises ValueError."""
    try:
        run_folder.write(str(path), text)
    except OSError as error:
        raise ValueError(f"--tree {path}: it cannot be written ({error.strerror})") from None


def flags():
    parser = evaluation.OneSentence(
        "astar_search.py", description="Draw the tree of one search by a model.  Without a flag: searches to check by hand.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--tree", metavar="FILE", required=True, help="out.html: a page with a slider; out.md: Mermaid")
    add("--model", default=str(ROOT / "tiny_base"), help="folder or hub id of a causal language model")
    add("--prompt", default="34*12=", help="what the model completes; may end in <think>")
    add("--answer", type=int, help="the right answer, for the reward; without it the product, if the prompt is a*b=")
    add("--K", type=int, default=8, help="leaves wanted")
    add("--tau", type=float, default=1.0, help="0: plain A*;  1: Gumbel search")
    add("--beta", type=float, help="temperature of h; without it the one that the value head was trained for")
    add("--guide", choices=("head", "none"), default="head", help="h: of the model's value head, if there is one, or 0")
    add("--width", type=int, default=1, help="nodes that a round may run at once")
    add("--max-new-tokens", type=int, default=48, help="longest completion in tokens")
    add("--max-nodes", type=int, default=1024, help="most nodes to expand")
    add("--max-open", type=int, default=65536, help="longest queue; beyond it the worst entries are pruned")
    add("--cover", type=float, default=1.0, help="stop when the leaves hold this much of pi; 1 for never")
    add("--seed", type=int, default=0, help="seed of the noise")
    return parser


def check(args):
    """Raise ValueError, one sentence, for a flag that cannot be meant."""
    for name in ("K", "width", "max_new_tokens", "max_nodes", "max_open"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    if not 0 <= args.tau <= 1:
        raise ValueError(f"--tau must lie in [0, 1], not {args.tau}")
    if not 0 < args.cover <= 1:
        raise ValueError(f"--cover must lie in (0, 1], not {args.cover}")
    if args.beta is not None and not 0 < args.beta < math.inf:
        raise ValueError(f"--beta must be above 0, not {args.beta}")
    if not 0 <= args.seed <= 2**31:
        raise ValueError(f"--seed must lie in [0, 2^31], not {args.seed}")
    if not args.prompt or any("\ud800" <= c <= "\udfff" for c in args.prompt):
        raise ValueError("--prompt must be a text in UTF-8, and not empty")
    path = pathlib.Path(args.tree)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"--tree {path}: the name must end in .html or .md")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):  # before the search, not after it
        raise ValueError(f"--tree {path}: it cannot be written there; give a file in a folder that exists")


def draw(args):
    """Search as the flags say.  Returns the record."""
    model, tokenizer = policy.load_policy(args.model)
    astar_search.check_model(model)
    answer, prefill = truth(args.prompt, args.answer)
    problem = data.Problem(args.prompt.removesuffix(prefill), answer, prefill=prefill)
    prompts = evaluation.encode(tokenizer, [problem])
    policy.check_context(model, len(prompts[0]), args.max_new_tokens)
    value = evaluation.load_guide(args.model, model, args.beta) if args.guide == "head" else None
    if value is None and args.guide == "head":
        print("no value head beside this model: h = 0, the search is guided by log pi alone", file=sys.stderr)
    options = astar_search.Options(
        policy.stop_tokens(model, tokenizer), args.K, args.tau, args.width, args.max_new_tokens, args.max_nodes, args.max_open,
        args.cover if args.cover < 1 else math.inf,
    )  # fmt: skip
    expander = astar_search.Expander(model, prompts, args.max_new_tokens, value)
    (tree,) = trees = astar_search.search(astar_search.root_keys(args.seed, 0, [0]), expander, options, WatchedTree)
    rollouts = astar_search.collect(trees, expander)
    _, verdicts = evaluation.judge(rollouts, tokenizer, [problem], reward_module.Reward(), args.max_new_tokens)

    def token_text(token):  # a part of a character decodes to U+FFFD: then the tokenizer's own name for it
        text = tokenizer.decode([token])
        return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))

    facts = record(tree, args.prompt, token_text, verdicts if answer is not None else None)
    guide = "h = 0" if value is None else f"h of the value head{f' at beta {args.beta:g}' if args.beta else ''}"
    about = f"K {args.K}, tau {args.tau:g}, width {args.width}, seed {args.seed}, {guide}; {sum(expander.spent)} model tokens"
    return facts | {"answer": answer, "about": about}


def main(argv=None):
    parser = flags()
    args = parser.parse_args(argv)
    try:
        check(args)
        facts = draw(args)
        path = pathlib.Path(args.tree)
        write(path, (page if path.suffix == ".html" else mermaid)(facts))
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    kinds = collections.Counter(map(state, facts["nodes"]))
    print(f"{path}: {facts['rounds']} rounds, {', '.join(f'{n} {kind}' for kind, n in kinds.items())}; {facts['why']}")


if __name__ == "__main__":
    main()
