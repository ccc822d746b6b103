"""examples/walk.py prints numbers that a student can recompute.

Here they are recomputed from the printed ones alone, with plain math and none of the project's
functions.
"""

import importlib
import math
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LETTERS = "ab."

# --------------------------------------------------------------------------------- Reading the page


@pytest.fixture(scope="module")
def output():
    """What the script prints."""
    command = [sys.executable, "examples/walk.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout


@pytest.fixture(scope="module")
def walk(output):
    """read_page of steps 1 to 6."""
    return read_page(output[: output.index("\n7  ")])


@pytest.fixture(scope="module")
def default(output):
    """read_page of step 7."""
    return read_page(output[output.index("\n7  ") :])


def read_page(output):
    """(tables, lines) of an output.

    tables: first word of the headings -> the tables with such headings, in order, each as
    {label of a row: {heading: number}}.
    """
    lines = output.splitlines()
    tables = {}
    inside_table = False
    for above, line in zip(lines, lines[1:]):
        row = re.fullmatch(r"   (\S+)((?: +-?\d+\.\d{3})+)", line)
        if row is None:
            inside_table = False
            continue
        if not inside_table:
            inside_table = True
            first_heading, *headings = above.split()
            table = {}
            tables.setdefault(first_heading, []).append(table)
        numbers = [float(x) for x in row[2].split()]
        assert len(numbers) == len(headings), line
        table[row[1]] = dict(zip(headings, numbers))
    return tables, lines


def assert_near(found, printed, units=2):
    """Equal up to so many units of the third decimal: a student starts from rounded numbers."""
    assert abs(found - printed) < 0.0005 + 0.001 * units, (found, printed)


def numbers_after(lines, words):
    """The numbers that follow these words on the first line that has them."""
    line = next(line for line in lines if words in line)
    return [float(x) for x in re.findall(r"-?\d+\.\d{3}", line.split(words, 1)[1])]


def queue_of(line):
    """[(name, f)] of a printed queue."""
    return [(name, float(f)) for name, f in re.findall(r"(x\S*) +(-?\d+\.\d{3}|inf)", line)]


def tokens_of(leaf):
    """The labels of a leaf's tokens: x→b and xb→. of xb."""
    return [f"{leaf[:t]}→{leaf[t]}" for t in range(1, len(leaf))]


# ---------------------------------------------------------------------------------------- The noise


def mix64(key, a):
    """SplitMix64 in plain integers."""
    x = (key + (a + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def gumbel(key):
    return -math.log(-math.log(((key >> 12) + 0.5) * 2.0**-52))


def test_the_dice_are_a_hash_of_the_path(walk):
    """Guards against noise that depends on anything but seed, iteration, problem and path."""
    tables, lines = walk
    root = mix64(mix64(mix64(0, 0), 1), 0)
    G_root = numbers_after(lines, "pop x ")[1]
    assert_near(gumbel(root), G_root, units=0)
    for children in tables["child"]:
        for name, row in children.items():
            key = root
            for letter in name[1:]:
                key = mix64(key, LETTERS.index(letter))
            assert_near(gumbel(key), row["Gumbel"], units=0)


# --------------------------------------------------------------------------------------- The search


def read_pops(lines):
    """[(name, {g, G, h, f}, is it a leaf?)] of the printed pops, in order."""
    pops = []
    for line in lines:
        if line.startswith("   pop "):
            words = line.split()  # pop NAME g 0.000 [G 0.000] h 0.000 f 0.000 [a leaf]
            pairs = re.findall(r" (\w) +(-?\d+\.\d{3}|inf)", line)
            numbers = {letter: float(x) for letter, x in pairs}
            pops.append((words[1], numbers, words[-1] == "leaf"))
    return pops


def read_queues(lines):
    """The printed queues, in order, as lists of (name, f); the last one is what is left."""
    queues = []
    for line in lines:
        if line.strip().startswith(("queue:", "left on the queue:")):
            queues.append(queue_of(line))
    return queues


def by_f(children):
    """The names of children, the largest f first."""
    return sorted(children, key=lambda name: -children[name]["f"])


def check_children(parent, children, policy_row):
    """Recompute every column of a table of children.

    parent: g and G as printed.  policy_row: the parent's row of the policy.
    """
    Z = max(row["noisy"] for row in children.values())
    for child, row in children.items():
        assert_near(math.log(policy_row[f"π({child[-1]}|s)"]), row["logπ"], units=0)
        assert_near(parent["g"] + row["logπ"], row["g"])
        assert_near(row["g"] + row["Gumbel"], row["noisy"])
        # v = G(s) - noisy + log(1 - e^(noisy - Z)),  G = G(s) - max(0, v) - log(1 + e^(-|v|))
        not_the_best = 1 - math.exp(row["noisy"] - Z)
        v = -math.inf
        if not_the_best > 0:
            v = parent["G"] - row["noisy"] + math.log(not_the_best)
        G = parent["G"] - max(0, v) - math.log1p(math.exp(-abs(v)))
        assert_near(G, row["G"], units=3)
        assert row["h"] == policy_row["h(s)"]
        assert_near(row["G"] + row["h"], row["f"])
    assert max(row["G"] for row in children.values()) == parent["G"]


def test_h_is_the_soft_value(walk):
    """h(s) = log(u e + (1 - u) / e) at beta = 1; and each row of the policy sums to one."""
    tables, _ = walk
    for row in tables["s"][0].values():
        u = row["u(s)"]
        assert_near(math.log(u * math.e + (1 - u) / math.e), row["h(s)"], units=0)
        assert_near(sum(row[f"π({letter}|s)"] for letter in LETTERS), 1.0, units=0)


def test_the_search(walk):
    """Each pop takes the largest f; then its best child and its next sibling are queued.

    Guards against a perturbation whose largest child is not the parent's G, and against a queue
    that pops the smallest.
    """
    tables, lines = walk
    policy = tables["s"][0]
    children_of = {}
    for table in tables["child"]:
        parent = next(iter(table))[:-1]
        children_of[parent] = table
    ranked = {}  # the children of a prefix, the largest f first
    for parent, table in children_of.items():
        ranked[parent] = by_f(table)

    pops = read_pops(lines)
    queues = read_queues(lines)
    assert len(pops) == len(queues) - 1
    queue = {"x": math.inf}
    leaves = []
    for (name, numbers, leaf), before, after in zip(pops, queues, queues[1:]):
        assert dict(before) == queue
        assert before[0] == (name, numbers["f"])
        assert numbers["f"] == max(queue.values())
        del queue[name]
        if name != "x":
            parent = name[:-1]
            for column in ("g", "G", "h", "f"):
                assert numbers[column] == children_of[parent][name][column]
            rank = ranked[parent].index(name)
            for sibling in ranked[parent][rank + 1 : rank + 2]:  # none behind the last one
                queue[sibling] = children_of[parent][sibling]["f"]
        if leaf:
            leaves.append(name)
        else:
            best = ranked[name][0]
            queue[best] = children_of[name][best]["f"]
            check_children(numbers, children_of[name], policy[name])
        assert dict(after) == queue
    assert leaves == list(tables["leaf"][0])


# --------------------------------------------------------------------------- Weights and advantages


def test_leaf_weights(walk):
    """Guards against the perturbed key in q, and kappa from anything but the best key left."""
    tables, lines = walk
    (kappa,) = numbers_after(lines, "κ =")
    left_on_queue = read_queues(lines)[-1]
    assert kappa == max(f for _, f in left_on_queue)
    g = {}
    for children in tables["child"]:
        for name, row in children.items():
            g[name] = row["g"]
    rows = tables["leaf"][0]
    total_weight = sum(row["weight"] for row in rows.values())
    for name, row in rows.items():
        assert row["g"] == g[name]
        assert_near(row["g"] + row["h"], row["φ"])
        # q = 1 - exp(-exp((phi - kappa)/tau)),  tau = 1
        assert_near(1 - math.exp(-math.exp(row["φ"] - kappa)), row["q"], units=1)
        assert_near(math.exp(row["g"]) / row["q"], row["weight"])
        assert_near(row["weight"] / total_weight, row["w"], units=1)
        assert row["r"] == (1 if name == "xb." else -1)


def test_advantages_and_values(walk):
    """GAE with lambda 1/2 and the head's two losses.

    Guards against V of the padding, and against tokens that all have the same weight.
    """
    tables, lines = walk
    policy = tables["s"][0]
    leaves = tables["leaf"][0]
    tokens = tables["token"][0]
    total = sum(leaf["w"] * (len(name) - 1) for name, leaf in leaves.items())
    v_loss = 0.0
    u_loss = 0.0
    for name, leaf in leaves.items():
        rows = [tokens[token] for token in tokens_of(name)]
        for t, row in enumerate(rows):
            prefix = name[: t + 1]
            assert row["V(s_t)"] == policy[prefix]["V(s)"]
            assert row["w"] == leaf["w"]
            next_value = leaf["r"]
            next_advantage = 0.0
            if t + 1 < len(rows):
                next_value = rows[t + 1]["V(s_t)"]
                next_advantage = rows[t + 1]["A_t"]
            assert_near(next_value - row["V(s_t)"], row["δ_t"], units=0)
            assert_near(row["δ_t"] + 0.5 * next_advantage, row["A_t"], units=0)
            assert_near(leaf["w"] / total, row["m_t"], units=0)
            target = 1 if leaf["r"] > 0 else 0
            v_loss += row["m_t"] * (row["V(s_t)"] - leaf["r"]) ** 2
            u_loss += row["m_t"] * (policy[prefix]["u(s)"] - target) ** 2
    printed = numbers_after(lines, "losses of the head, Σ m (V - r)^2 and Σ m (u - target)^2:")
    assert_near(v_loss, printed[0])
    assert_near(u_loss, printed[1])


# ---------------------------------------------------------------------------- Losses and the update


def test_mean_and_deviation_of_grpo(walk):
    """Both are weighted by w.  Guards against a deviation that is not."""
    tables, lines = walk
    leaves = tables["leaf"][0].values()
    total = sum(leaf["w"] for leaf in leaves)
    mean = sum(leaf["w"] * leaf["r"] for leaf in leaves) / total
    variance = sum(leaf["w"] * (leaf["r"] - mean) ** 2 for leaf in leaves) / total
    printed = numbers_after(lines, "grpo:  mean")
    assert_near(mean, printed[0])
    assert_near(math.sqrt(variance), printed[1])
    for name, leaf in tables["leaf"][0].items():
        for token in tokens_of(name):
            advantage = (leaf["r"] - mean) / math.sqrt(variance)
            assert_near(advantage, tables["token"][1][token]["grpo.A"])


def test_optimal_value_of_apo(walk):
    """V* = log mean e^r over the printed samples."""
    _, lines = walk
    samples = re.search(r"samples ((?:x\S* )+)", "\n".join(lines))[1].split()
    (V_star,) = numbers_after(lines, "apo:   samples")
    terms = [math.exp(1 if sample == "xb." else -1) for sample in samples]
    assert_near(math.log(sum(terms) / len(terms)), V_star, units=0)


def test_losses_and_gradients(walk):
    """The three losses at ratio 1 and their gradients, by token and by logit.

    Guards against a wrong sign, a missing 2, and a gradient without the softmax's -pi.
    """
    tables, lines = walk
    policy = tables["s"][0]
    tokens, rows, _ = tables["token"]
    (V_star,) = numbers_after(lines, "apo:   samples")
    ppo_loss = 0.0
    grpo_loss = 0.0
    apo_loss = 0.0
    for name, leaf in tables["leaf"][0].items():
        apo_loss += leaf["w"] * (V_star - leaf["r"]) ** 2
        for token in tokens_of(name):
            row = rows[token]
            m = tokens[token]["m_t"]
            assert row["ppo.A"] == tokens[token]["A_t"]
            assert_near(-m * row["ppo.A"], row["ppo.c"])
            assert_near(-m * row["grpo.A"], row["grpo.c"])
            assert_near(2 * leaf["w"] * (V_star - leaf["r"]), row["apo.c"])
            ppo_loss -= m * row["ppo.A"]
            grpo_loss -= m * row["grpo.A"]
    printed = numbers_after(lines, "loss:  ppo")
    assert_near(ppo_loss, printed[0], units=3)
    assert_near(grpo_loss, printed[1], units=3)
    assert_near(apo_loss, printed[2], units=3)

    # dloss/dtheta(s, a) = sum over the tokens b written at s of c ( [a = b] - pi(a|s) )
    for kind in ("ppo", "grpo", "apo"):
        for s, gradient in tables[kind][0].items():
            for a in LETTERS:
                terms = []
                for token, row in rows.items():
                    prefix, b = token.split("→")
                    if prefix == s:
                        terms.append(row[f"{kind}.c"] * ((a == b) - policy[s][f"π({a}|s)"]))
                assert_near(sum(terms), gradient[a])


def test_the_update(walk):
    """theta and pi after one step.  Guards against ascent instead of descent."""
    tables, lines = walk
    before, after = tables["s"]
    for s, row in after.items():
        total = sum(math.exp(row[f"θ({letter})"]) for letter in LETTERS)
        for a in LETTERS:
            theta = math.log(before[s][f"π({a}|s)"]) - 2 * tables["ppo"][0][s][a]
            assert_near(theta, row[f"θ({a})"])
            assert_near(math.exp(row[f"θ({a})"]) / total, row[f"π({a}|s)"])
    printed = numbers_after(lines, "π(b.) = π(b|x) π(.|xb):")
    right_before = before["x"]["π(b|s)"] * before["xb"]["π(.|s)"]
    right_after = after["x"]["π(b|s)"] * after["xb"]["π(.|s)"]
    assert_near(right_before, printed[0])
    assert_near(right_after, printed[1])
    assert right_after > right_before


def test_the_clip(walk):
    """The ratios after one step, and the gradient that the clip leaves.

    Guards against a clip that holds the side it should let go.
    """
    tables, lines = walk
    before, after = tables["s"]
    tokens, _, rows = tables["token"]
    loss = 0.0
    for token, row in rows.items():
        s, a = token.split("→")
        m = tokens[token]["m_t"]
        ratio = after[s][f"π({a}|s)"] / before[s][f"π({a}|s)"]
        assert_near(ratio, row["ratio"], units=6)  # .085/.100 has a digit less
        held = (row["A"] > 0 and row["ratio"] > 1.2) or (row["A"] < 0 and row["ratio"] < 0.8)
        assert_near(0 if held else -m * row["ratio"] * row["A"], row["c"])
        clipped = min(max(row["ratio"], 0.8), 1.2)
        loss -= m * min(row["ratio"] * row["A"], clipped * row["A"])
    assert any(row["c"] == 0 for row in rows.values())
    assert any(row["c"] != 0 for row in rows.values())
    assert_near(loss, numbers_after(lines[::-1], "loss:  ppo")[0])


# ----------------------------------------------------------------------------- Names and quotations


def test_the_functions_at_the_right_exist(output):
    """Guards against a name that the rest of the project has changed."""
    names = re.findall(r" {2,}((?:astar_search|policy|value)\.[\w.]+)$", output, re.MULTILINE)
    assert len(names) == 13
    for name in names:
        module, *attributes = name.split(".")
        thing = importlib.import_module(module)
        for attribute in attributes:
            thing = getattr(thing, attribute)
        assert callable(thing)


def test_the_walkthrough_quotes_it(output):
    """Guards against a quotation that was not updated."""
    text = (ROOT / "docs" / "walkthrough.md").read_text()
    section = text.split("\n## The walk\n")[1].split("\n## ")[0]
    quoted = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert quoted
    for block in quoted:
        assert block in output


# ---------------------------------------------------------------------------- The default algorithm


def test_plain_search_until_right(walk, default):
    """Step 7: children, queue and stop of both searches, from the table of step 1 alone.

    Guards against noise at tau = 0, an h of the child's own, and a search that goes on.
    """
    (problem,) = walk[0]["s"][:1]
    tables, lines = default
    assert "Gumbel" not in "".join(lines) and len(tables["below"]) == 6
    for children in tables["below"]:
        for row in children.values():
            assert_near(row["g"] + row["h"], row["f"])
    starts = [i for i, line in enumerate(lines) if " x     inf" in line]
    assert len(starts) == 2
    for start, h_of, leaves in (
        (starts[0], {name: row["h(s)"] for name, row in problem.items()}, ["xb."]),
        (starts[1], dict.fromkeys(problem, 0.0), ["xaa", "xb."]),
    ):
        f = {"x": math.inf}
        queue = ["x"]  # every child is queued at once here: the order of pops is the same
        found = []
        pops = []
        while not found or found[-1] != "xb.":
            name = min(queue, key=lambda name: (-round(f[name], 3), name))
            queue.remove(name)
            pops.append(name)
            if len(name) == 3 or name.endswith("."):
                found.append(name)
                continue
            for letter in LETTERS:
                g = 0.0
                for t in range(1, len(name)):
                    g += math.log(problem[name[:t]][f"π({name[t]}|s)"])
                child = name + letter
                g += math.log(problem[name][f"π({letter}|s)"])
                f[child] = g + h_of[name]
                queue.append(child)
        own = lines[start:]
        printed = read_pops(own)[: len(pops)]
        assert [name for name, *_ in printed] == pops and found == leaves
        for name, row, _ in printed[1:]:
            assert "G" not in row
            assert_near(f[name], row["f"])
            assert_near(row["g"] + row["h"], row["f"])
        assert f"xb. is right: done; leaves {' '.join(found)}" in "\n".join(own)


def test_em_from_the_printed_numbers(walk, default):
    """Weights, advantages, gradient and update of em: each solved problem counts alike.

    Guards against q at tau = 0, and against a wrong leaf that teaches.
    """
    policy_rows = walk[0]["s"][0]
    tables, lines = default
    (found,) = tables["found"]
    total = sum(row["π"] for row in found.values())
    Z = sum(row["π"] / total * row["t"] for row in found.values())
    for leaf, row in found.items():
        pi = policy_rows["x"][f"π({leaf[1]}|s)"] * policy_rows[leaf[:2]][f"π({leaf[2]}|s)"]
        assert_near(pi, row["π"])
        assert_near(pi / total, row["w"])
        assert row["r"] == (1.0 if leaf == "xb." else -1.0)
        assert row["t"] == (1.0 if leaf == "xb." else 0.0)
        assert_near(row["t"] / Z, row["A"], units=5)
    (written,) = tables["written"]
    weights = [found[leaf]["w"] for leaf in found for _ in leaf[1:]]
    for row, w in zip(written.values(), weights, strict=True):
        assert_near(w / sum(weights), row["m"])
        assert_near(-row["m"] * row["A"], row["c"])
    loss = numbers_after(lines, "loss:  em")[0]
    assert_near(-sum(row["m"] * row["A"] for row in written.values()), loss, units=4)

    (gradient,) = tables["em"]
    (then,) = tables["then"]
    tokens = {"x": "x→b", "xb": "xb→."}
    for prefix, row in gradient.items():
        theta = {}
        for letter in LETTERS:
            pi = policy_rows[prefix][f"π({letter}|s)"]
            slope = 0.0
            if prefix in tokens:
                label = tokens[prefix]
                slope = written[label]["c"] * ((letter == label[-1]) - pi)
            assert_near(slope, row[letter])
            theta[letter] = math.log(pi) - 2 * row[letter]
        norm = sum(math.exp(x) for x in theta.values())
        for letter in LETTERS:
            assert_near(math.exp(theta[letter]) / norm, then[prefix][f"π({letter}|s)"])
    before, after = numbers_after(lines, "em: π(b.)")
    assert_near(policy_rows["x"]["π(b|s)"] * policy_rows["xb"]["π(.|s)"], before)
    assert_near(then["x"]["π(b|s)"] * then["xb"]["π(.|s)"], after)
