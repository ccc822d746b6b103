"""draw_tree.py -- a picture of one search: which prefixes it opened, in what order, and why.

    python examples/draw_tree.py --prompt "34*12=" --out out.html   # with a slider over the rounds
    python examples/draw_tree.py --prompt "34*12=" --out out.md     # in Mermaid, cut to its limits
    python examples/draw_tree.py --model runs/local/checkpoint_iter_360 --out out.html

The page is one file that needs no network: tree.html beside this file, with the record of the
search as JSON in it.  The record is made by WatchedTree, a subclass of the search's own Tree.  The
search is the same as without it.
"""

import argparse
import collections
import functools
import json
import math
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward as reward_module

# ------------------------------------------------------------------------------------------- Record

WHY_STOPPED = {
    "leaves": "stopped by --K",
    "covered": "stopped by --cover",
    "max_nodes": "stopped by --max-nodes",
    "exhausted": "ended by an empty queue",
}


class WatchedTree(astar_search.Tree):
    """A search that remembers in which round each node was queued, evaluated, popped or pruned.

    A round is one forward of the model and the pops that follow from it.  The root is queued in
    round 0.
    """

    def __init__(self, problem, key, options):
        super().__init__(problem, key, options)
        self.round = 0
        # Each is {node: round}, in the order of the events.
        self.queued_in = {self.root: 0}
        self.evaluated_in = {}
        self.popped_in = {}
        self.pruned_in = {}

    def next_to_evaluate(self):
        nodes = super().next_to_evaluate()
        self.round += 1
        for node in nodes:
            # A node may be asked again for more children.  Its first round counts.
            self.evaluated_in.setdefault(node, self.round)
        return nodes

    def accept_leaf(self, leaf):
        super().accept_leaf(leaf)
        self.popped_in[leaf] = self.round

    def push_child(self, parent, rank):
        if rank == 0:  # the best child is queued when its parent was popped
            self.popped_in[parent] = self.round
        child = super().push_child(parent, rank)
        if child is not None:
            self.queued_in[child] = self.round
        return child

    def pop_evaluated_nodes(self):
        super().pop_evaluated_nodes()
        if not self.pruned:
            return
        in_queue = {node for _, node in self.queue}
        for node in self.queued_in:
            if node not in self.popped_in and node not in in_queue:
                self.pruned_in.setdefault(node, self.round)


def visible(text):
    """A token as one line of text: a space as an open box, what does not print as its escape."""
    shown = {" ": "\u2423", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    characters = []
    for character in text:
        if character in shown:
            characters.append(shown[character])
        elif character.isprintable():
            characters.append(character)
        else:
            characters.append(f"\\u{ord(character):04x}")
    return "".join(characters)


def record_search(tree, prompt, token_text, verdicts=None):
    """A finished WatchedTree as a dict for JSON.

    token_text(id) -> str.  verdicts: what the reward says of each leaf, a list of dicts, or None.

    `nodes` lists the nodes in the order queued (node_record).  `popped` lists the places in `nodes`
    of those that were popped, in the order popped.
    """
    place = {node: i for i, node in enumerate(tree.queued_in)}
    nodes = []
    for node in tree.queued_in:
        if node.parent is None:
            row = {"token": visible(prompt)}
        else:
            row = {"token": visible(token_text(node.token)), "parent": place[node.parent]}
        row.update(node_record(tree, node))
        nodes.append(row)

    expanded = [node for node in tree.popped_in if not node.is_leaf]
    for number, node in enumerate(expanded, start=1):
        nodes[place[node]]["order"] = number
    for number, leaf in enumerate(tree.leaves, start=1):
        row = nodes[place[leaf]]
        row["accepted"] = number
        row["weight"] = leaf.weight
        if verdicts is not None:
            verdict = verdicts[number - 1]
            row.update({name: x for name, x in verdict.items() if x is not None})
    return {
        "prompt": visible(prompt),
        "K": tree.options.K,
        "tau": tree.options.tau,
        "rounds": tree.round,
        "why": WHY_STOPPED[tree.stopped],
        "pruned": tree.pruned,
        "popped": [place[node] for node in tree.popped_in],
        "nodes": nodes,
    }


def node_record(tree, node):
    """The facts of one node as a dict.  What did not happen to the node is left out.

    id: its token; depth; rank among its siblings; log_prob, g, G, h, f in nats, absent at the root.
    The rounds queued, evaluated, popped, pruned.  leaf, truncated: True.
    record_search adds: order, its number among the expanded nodes; accepted, its number among the
    leaves; weight; the parts of its verdict.
    """
    row = {}
    if node.parent is not None:
        row["id"] = node.token
        for name in ("depth", "rank", "log_prob", "g", "G", "h", "f"):
            row[name] = getattr(node, name)
    rounds_of_events = {
        "queued": tree.queued_in,
        "evaluated": tree.evaluated_in,
        "popped": tree.popped_in,
        "pruned": tree.pruned_in,
    }
    for event, round_of in rounds_of_events.items():
        if node in round_of:
            row[event] = round_of[node]
    if node.is_leaf:
        row["leaf"] = True
    if node.truncated:
        row["truncated"] = True
    return row


# --------------------------------------------------------------------------------------------- HTML


def html_page(facts):
    """The record as an HTML page."""
    # In JSON, < can be written as an escape.  So no token can end the script element around it.
    blob = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
    template = (pathlib.Path(__file__).parent / "tree.html").read_text(encoding="utf-8")
    return template.replace("RECORD", blob, 1)


# ------------------------------------------------------------------------------------------ Mermaid

# Mermaid refuses more than 500 edges or 50,000 characters.
MERMAID_NODES = 400
MERMAID_TEXT = 45_000
LABEL_LENGTH = 24  # characters of a token

STYLES = {
    "expanded": "fill:#dbe7f7,stroke:#3567a8,color:#1b1f24",
    "open": "fill:#ffffff,stroke:#6b727c,color:#1b1f24,stroke-dasharray:4 3",
    "pruned": "fill:#eeeeee,stroke:#9aa0a8,color:#5a6068,stroke-dasharray:1 3",
    "right": "fill:#d3f0d8,stroke:#1a7f37,color:#1b1f24,stroke-width:3px",
    "wrong": "fill:#fde3dc,stroke:#b5371b,color:#1b1f24,stroke-width:3px",
    "leaf": "fill:#ece2fa,stroke:#7042b5,color:#1b1f24,stroke-width:3px",
}


def kind_of(node):
    """What became of a recorded node in the end: a key of STYLES."""
    if "accepted" in node:
        if "correct" not in node:  # no answer to compare with
            return "leaf"
        return "right" if node["correct"] else "wrong"
    if "order" in node:
        return "expanded"
    if "pruned" in node:
        return "pruned"
    return "open"


def node_title(node):
    """What a node is, with its number among the expanded nodes or among the leaves."""
    kind = kind_of(node)
    if kind == "expanded":
        return f"({node['order']})"
    if kind == "right":
        return f"\u2713 leaf {node['accepted']}"
    if kind == "wrong":
        return f"\u2717 leaf {node['accepted']}"
    if kind == "leaf":
        return f"leaf {node['accepted']}"
    return kind


def escape(text):
    """Mermaid's character codes for all but letters and digits.

    Quotes, brackets, pipes, backticks and # would end something.
    """
    return "".join(c if c.isalnum() else f"#{ord(c)};" for c in text)


def node_label(node, tau):
    """Lines of text: title and token, the numbers of the search, reward and weight of a leaf."""
    token = node["token"]
    if len(token) > LABEL_LENGTH:
        token = token[: LABEL_LENGTH - 1] + "\u2026"
    lines = [f"{node_title(node)} {escape(token)}"]
    if "f" in node:
        numbers = ["f", "g", "G", "h"] if tau > 0 else ["f", "g", "h"]
        lines.append(" ".join(f"{name} {node[name]:.2f}" for name in numbers))
    if "accepted" in node:
        weight = f"weight {node['weight']:.3g}"
        if "reward" in node:
            weight = f"reward {node['reward']:.1f} {weight}"
        lines.append(weight)
    return "<br/>".join(lines)


def mermaid_line(nodes, i, tau):
    """Node number i with the edge from its parent.  Leaves are round, expanded nodes square."""
    node = nodes[i]
    kind = kind_of(node)
    label = node_label(node, tau)
    if kind == "expanded":
        box = f'["{label}"]'
    elif kind in ("open", "pruned"):
        box = f'("{label}")'
    else:
        box = f'(["{label}"])'
    if "parent" in node:
        return f"  n{node['parent']} --> n{i}{box}:::{kind}"
    return f"  n{i}{box}:::{kind}"


def by_importance(nodes):
    """Numbers of the nodes in the order in which the chart takes them, parents before children.

    First come the paths to the accepted leaves, then nodes as they were expanded, then the queue
    by f.
    """
    last = len(nodes)

    def importance(i):
        node = nodes[i]
        return node.get("accepted", last), node.get("order", last), -node.get("f", math.inf)

    taken = {}  # a dict is a set with a fixed order
    for i in sorted(range(last), key=importance):
        path = []
        while i is not None and i not in taken:
            path.append(i)
            i = nodes[i].get("parent")
        for number in reversed(path):
            taken[number] = True
    return list(taken)


def mermaid(facts):
    """The record as Markdown with one Mermaid flowchart, cut to MERMAID_NODES and MERMAID_TEXT."""
    nodes = facts["nodes"]
    shown = by_importance(nodes)[:MERMAID_NODES]
    lines = [mermaid_line(nodes, i, facts["tau"]) for i in shown]
    while sum(len(line) for line in lines) > MERMAID_TEXT:
        lines.pop()
    styles = []
    for kind in dict.fromkeys(kind_of(nodes[i]) for i in shown):
        styles.append(f"  classDef {kind} {STYLES[kind]}")

    what = f"all {len(nodes)} prefixes that it queued."
    if len(lines) < len(nodes):
        what = (
            f"{len(lines)} of the {len(nodes)} prefixes that it queued, because Mermaid holds no "
            "more: the paths to the accepted leaves, then the others in the order expanded, then "
            "the best of the queue."
        )
    head = [
        f"A search of {facts['rounds']} rounds ({facts['why']}): {what}",
        "(n): expanded as number n; dashed: still open; "
        "leaf n: accepted as number n, \u2713 right, \u2717 wrong.",
        "",
        "```mermaid",
        "flowchart LR",
    ]
    return "\n".join(head + lines + styles + ["```", ""])


# ------------------------------------------------------------------------------------- Command line


def make_parser():
    """The parser of draw_tree.py."""
    parser = data.OneLineParser(
        prog="draw_tree.py",
        description="Draw the tree of one search by a model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--out",
        metavar="FILE",
        required=True,
        help="out.html: a page with a slider; out.md: Mermaid",
    )
    add(
        "--model",
        default=str(ROOT / "tiny_base"),
        help="folder or hub id of a causal language model",
    )
    add("--prompt", default="34*12=", help="what the model completes; may end in <think>")
    add(
        "--answer",
        type=int,
        help="the right answer, for the reward; without it the product, if the prompt is a*b=",
    )
    add("--K", type=int, default=8, help="leaves wanted")
    add("--tau", type=float, default=1.0, help="0: plain A*;  1: Gumbel search")
    add(
        "--beta",
        type=float,
        help="temperature of h; without it the one that the value head was trained for",
    )
    add(
        "--guide",
        choices=("head", "none"),
        default="head",
        help="h: of the model's value head, if there is one, or 0",
    )
    add("--width", type=int, default=1, help="nodes that a round may evaluate at once")
    add("--max-new-tokens", type=int, default=48, help="longest completion in tokens")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a completion ends with this text too; may be repeated",
    )
    add("--max-nodes", type=int, default=1024, help="most nodes to expand")
    add(
        "--max-open",
        type=int,
        default=65536,
        help="longest queue; beyond it the worst entries are pruned",
    )
    add(
        "--cover",
        type=float,
        default=1.0,
        help="stop when the leaves hold this much of pi; 1 for never",
    )
    add("--seed", type=int, default=0, help="seed of the noise")
    return parser


def check_arguments(arguments):
    """Raise ValueError, one sentence, for a flag whose value makes no sense.

    --stop becomes the list of stop texts.
    """
    for name in ("K", "width", "max_new_tokens", "max_nodes", "max_open"):
        number = getattr(arguments, name)
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, not {number}")
    if not 0 <= arguments.tau <= 1:
        raise ValueError(f"--tau must lie in [0, 1], not {arguments.tau}")
    if not 0 < arguments.cover <= 1:
        raise ValueError(f"--cover must lie in (0, 1], not {arguments.cover}")
    if arguments.beta is not None and not 0 < arguments.beta < math.inf:
        raise ValueError(f"--beta must be above 0, not {arguments.beta}")
    if not 0 <= arguments.seed <= 2**31:
        raise ValueError(f"--seed must lie in [0, 2^31], not {arguments.seed}")
    # Bytes that are not UTF-8 reach Python as lone surrogates.
    if not arguments.prompt or any("\ud800" <= c <= "\udfff" for c in arguments.prompt):
        raise ValueError("--prompt must be a text in UTF-8, and not empty")
    arguments.stop = evaluation.stop_texts(arguments.stop)
    check_out(pathlib.Path(arguments.out))


def check_out(path):
    """Raise ValueError if the picture could not be written.  Asked before the search."""
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"--out {path}: the name must end in .html or .md")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(
            f"--out {path}: it cannot be written there; give a file in a folder that exists"
        )


def problem_of_prompt(prompt, answer):
    """The Problem of a prompt such as `34*12=` or `34*12=<think>`.

    answer: the right number; None: the product if the prompt is one, else nothing is known.
    """
    question = prompt.removesuffix("<think>")
    product = re.fullmatch(r"\s*(\d{1,9})\s*\*\s*(\d{1,9})\s*=\s*", question)
    if answer is None and product is not None:
        answer = int(product[1]) * int(product[2])
    return data.Problem(question, answer, prefill=prompt[len(question) :])


def load_guide(arguments, model):
    """The value function of the head beside the model; None, so that h = 0, if there is no head."""
    if arguments.guide == "none":
        return None
    value_function = evaluation.load_value_function(arguments.model, model, arguments.beta)
    if value_function is None:
        print(
            "no value head beside this model: h = 0, the search is guided by log pi alone",
            file=sys.stderr,
        )
    return value_function


def search_prompt(prompt, model, tokenizer, value_function, arguments):
    """Search below one prompt, a list of token ids.  Returns (tree, expander)."""
    options = astar_search.Options(
        eos=policy.stop_tokens(model, tokenizer),
        stop=astar_search.StopTexts(tokenizer, arguments.stop, [prompt]),
        K=arguments.K,
        tau=arguments.tau,
        width=arguments.width,
        max_new_tokens=arguments.max_new_tokens,
        max_nodes=arguments.max_nodes,
        max_open=arguments.max_open,
        cover=arguments.cover if arguments.cover < 1 else math.inf,
    )
    expander = astar_search.Expander(model, [prompt], arguments.max_new_tokens, value_function)
    keys = astar_search.root_keys(arguments.seed, 0, [0])
    (tree,) = astar_search.search(keys, expander, options, tree_class=WatchedTree)
    return tree, expander


def token_text(tokenizer, token):
    """The text of one token.  A part of a character has none: then the tokenizer's name for it."""
    text = tokenizer.decode([token])
    if text == "" or "\ufffd" in text:
        return str(tokenizer.convert_ids_to_tokens(token))
    return text


def describe_search(arguments, value_function, model_tokens):
    """The flags that matter and the price of the search, in one line."""
    guide = "h = 0"
    if value_function is not None:
        guide = "h of the value head"
        if arguments.beta is not None:
            guide += f" at beta {arguments.beta:g}"
    return (
        f"K {arguments.K}, tau {arguments.tau:g}, width {arguments.width}, "
        f"seed {arguments.seed}, {guide}; {model_tokens} model tokens"
    )


def draw(arguments):
    """Search as the flags say.  Returns the record of the search."""
    arguments.model = fsdp.newest_checkpoint(arguments.model)
    model, tokenizer = policy.load_policy(arguments.model)
    problem = problem_of_prompt(arguments.prompt, arguments.answer)
    (prompt,) = evaluation.encode_prompts(tokenizer, [problem])
    policy.check_context(model, len(prompt), arguments.max_new_tokens)
    astar_search.check_model(model, longest=len(prompt) + arguments.max_new_tokens)
    value_function = load_guide(arguments, model)
    tree, expander = search_prompt(prompt, model, tokenizer, value_function, arguments)

    verdicts = None
    if problem.answer is not None:
        rollouts = astar_search.collect([tree], expander)
        _, verdicts = evaluation.judge_rollouts(
            rollouts,
            tokenizer,
            [problem],
            reward_module.Reward(),
            arguments.max_new_tokens,
            stop=arguments.stop,
        )
    facts = record_search(
        tree=tree,
        prompt=arguments.prompt,
        token_text=functools.partial(token_text, tokenizer),
        verdicts=verdicts,
    )
    facts["answer"] = problem.answer
    facts["about"] = describe_search(arguments, value_function, sum(expander.spent))
    return facts


def write_picture(path, facts):
    """Write the page or the Mermaid chart; the old file stays if that fails.  Raises ValueError."""
    text = html_page(facts) if path.suffix == ".html" else mermaid(facts)
    try:
        fsdp.write_file(str(path), text)
    except OSError as error:
        raise ValueError(f"--out {path}: it cannot be written ({error.strerror})") from None


def main(argv=None):
    parser = make_parser()
    arguments = parser.parse_args(argv)
    path = pathlib.Path(arguments.out)
    try:
        check_arguments(arguments)
        facts = draw(arguments)
        write_picture(path, facts)
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    numbers = collections.Counter(kind_of(node) for node in facts["nodes"])
    counts = ", ".join(f"{n} {kind}" for kind, n in numbers.items())
    print(f"{path}: {facts['rounds']} rounds, {counts}; {facts['why']}")


if __name__ == "__main__":
    main()
