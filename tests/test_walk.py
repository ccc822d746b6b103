"""experiments/walk.py prints numbers a student can recompute; here they are recomputed from the printed ones alone, with
plain math and none of the project's functions."""

import math
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LETTERS = "ab."


@pytest.fixture(scope="module")
def output():
    return subprocess.run([sys.executable, "experiments/walk.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def walk(output):
    """tables: first column of the heading -> [{row name: {column: number}}, ...] in order; lines: all of them."""
    tables, lines, inside = {}, output.splitlines(), False
    for line, above in zip(lines[1:], lines):
        row = re.fullmatch(r"   (\S+)((?: +-?\d+\.\d{3})+)", line)
        if row and not inside:
            kind, *head = above.split()
            tables.setdefault(kind, []).append({})
        inside = bool(row)
        if row:
            assert len(row[2].split()) == len(head), line
            tables[kind][-1][row[1]] = dict(zip(head, map(float, row[2].split())))
    return tables, lines


def near(found, printed, ulps=2):
    """Equal up to two units of the third decimal: a student starts from rounded numbers."""
    assert abs(found - printed) < 0.0005 + 0.001 * ulps, (found, printed)


def after(lines, words):
    """The numbers that follow these words on a line."""
    line = next(line for line in lines if words in line)
    return [float(x) for x in re.findall(r"-?\d+\.\d{3}", line.split(words, 1)[1])]


def queue_of(line):
    """[(name, f)] of a printed queue."""
    return [(name, float(f)) for name, f in re.findall(r"(x\S*) +(-?\d+\.\d{3}|inf)", line)]


def test_the_dice_are_a_hash_of_the_path(walk):
    """SplitMix64 and Gumbel in plain integers.  Guards against noise that depends on anything but seed, iteration,
    problem and path."""
    mod = 1 << 64

    def mix(key, a):
        x = (key + (a + 1) * 0x9E3779B97F4A7C15) % mod
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % mod
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % mod
        return x ^ (x >> 31)

    gumbel = lambda key: -math.log(-math.log(((key >> 12) + 0.5) * 2.0**-52))
    tables, lines = walk
    root = mix(mix(mix(0, 0), 1), 0)
    near(gumbel(root), after(lines, "pop x ")[1], ulps=0)
    for children in tables["child"]:
        for name, row in children.items():
            key = root
            for letter in name[1:]:
                key = mix(key, LETTERS.index(letter))
            near(gumbel(key), row["Gumbel"], ulps=0)


def test_the_search(walk):
    """h, g, G, f of every child; each pop takes the largest f, and its best child and its next sibling follow.  Guards
    against a perturbation whose largest child is not the parent's G, and against a queue that pops the smallest."""
    tables, lines = walk
    policy, *_ = tables["s"]
    for row in policy.values():
        near(math.log(row["u(s)"] * math.e + (1 - row["u(s)"]) / math.e), row["h(s)"], ulps=0)
        near(sum(row[f"π({a}|s)"] for a in LETTERS), 1.0, ulps=0)
    children = {name[:-1]: rows for rows in tables["child"] for name in rows}
    pops = [line.split() for line in lines if line.startswith("   pop ")]
    queues = [queue_of(line) for line in lines if line.strip().startswith(("queue:", "left on the queue:"))]
    queue, leaves = {"x": math.inf}, []
    ranked = {s: sorted(rows, key=lambda name: -rows[name]["f"]) for s, rows in children.items()}
    for pop, shown, behind in zip(pops, queues, queues[1:]):
        name, (g, G, h, f) = pop[1], map(float, pop[3:10:2])
        assert shown[0] == (name, f) == max(queue.items(), key=lambda item: item[1]) and dict(shown) == queue
        queue.pop(name)
        if name != "x":
            siblings = ranked[name[:-1]]
            assert [g, G, h, f] == [children[name[:-1]][name][key] for key in "gGhf"]
            queue |= {n: children[name[:-1]][n]["f"] for n in siblings[siblings.index(name) + 1 :][:1]}
        if pop[-1] == "leaf":
            leaves.append(name)
        else:
            rows = children[name]
            best = ranked[name][0]
            queue[best] = rows[best]["f"]
            Z = max(row["noisy"] for row in rows.values())
            for child, row in rows.items():
                near(math.log(policy[name][f"π({child[-1]}|s)"]), row["logπ"], ulps=0)
                near(g + row["logπ"], row["g"])
                near(row["g"] + row["Gumbel"], row["noisy"])
                left = 1 - math.exp(row["noisy"] - Z)
                v = G - row["noisy"] + math.log(left) if left > 0 else -math.inf
                near(G - max(0, v) - math.log1p(math.exp(-abs(v))), row["G"], ulps=3)
                assert row["h"] == policy[name]["h(s)"]
                near(row["G"] + row["h"], row["f"])
            assert max(row["G"] for row in rows.values()) == G
        assert dict(behind) == queue
    assert len(pops) == len(queues) - 1 and leaves == list(tables["leaf"][0])


def test_leaf_weights(walk):
    """Guards against the perturbed key in q, and kappa from anything but the best key left behind."""
    tables, lines = walk
    left = next(line for line in lines if "left on the queue:" in line)
    kappa = after(lines, "κ =")[0]
    assert kappa == max(f for _, f in queue_of(left))
    rows = tables["leaf"][0]
    g = {name: row["g"] for children in tables["child"] for name, row in children.items()}
    for name, row in rows.items():
        assert row["g"] == g[name]
        near(row["g"] + row["h"], row["φ"])
        near(1 - math.exp(-math.exp(row["φ"] - kappa)), row["q"], ulps=1)
        near(math.exp(row["g"]) / row["q"], row["weight"])
        near(row["weight"] / sum(other["weight"] for other in rows.values()), row["w"], ulps=1)
        assert row["r"] == (1 if name == "xb." else -1)


def test_advantages_and_values(walk):
    """GAE with lambda 1/2 and the head's two losses.  Guards against V of the padding, and tokens weighted alike."""
    tables, lines = walk
    policy, leaves, tokens = tables["s"][0], tables["leaf"][0], tables["token"][0]
    total = sum(leaf["w"] * (len(name) - 1) for name, leaf in leaves.items())
    v_loss = u_loss = 0.0
    for name, leaf in leaves.items():
        own = [tokens[f"{name[:t]}→{name[t]}"] for t in range(1, len(name))]
        for t, row in enumerate(own):
            last = t == len(own) - 1
            assert row["V(s_t)"] == policy[name[: t + 1]]["V(s)"] and row["w"] == leaf["w"]
            near((leaf["r"] if last else own[t + 1]["V(s_t)"]) - row["V(s_t)"], row["δ_t"], ulps=0)
            near(row["δ_t"] + (0 if last else 0.5 * own[t + 1]["A_t"]), row["A_t"], ulps=0)
            near(leaf["w"] / total, row["m_t"], ulps=0)
            v_loss += row["m_t"] * (row["V(s_t)"] - leaf["r"]) ** 2
            u_loss += row["m_t"] * (policy[name[: t + 1]]["u(s)"] - (leaf["r"] > 0)) ** 2
    printed = after(lines, "losses of the head, Σ m (V - r)^2 and Σ m (u - target)^2:")
    near(v_loss, printed[0])
    near(u_loss, printed[1])


def test_losses_and_gradients(walk):
    """The three losses at ratio 1 and their gradients, per token and per logit.  Guards against a sign, a missing 2, a
    spread that is not weighted, and a gradient that forgets the softmax's -pi."""
    tables, lines = walk
    policy, leaves, (tokens, losses, _) = tables["s"][0], tables["leaf"][0], tables["token"]
    w, r = ([leaf[key] for leaf in leaves.values()] for key in "wr")
    mean = sum(x * y for x, y in zip(w, r)) / sum(w)
    std = math.sqrt(sum(x * (y - mean) ** 2 for x, y in zip(w, r)) / sum(w))
    for found, printed in zip((mean, std), after(lines, "grpo:  mean")):
        near(found, printed)
    samples = re.search(r"samples ((?:x\S* )+)", "\n".join(lines))[1].split()
    V_star = after(lines, "apo:   samples")[0]
    near(math.log(sum(math.exp(1 if y == "xb." else -1) for y in samples) / len(samples)), V_star, ulps=0)
    sums = dict.fromkeys(("ppo", "grpo", "apo"), 0.0)
    leaf_of = {f"{name[:t]}→{name[t]}": leaf for name, leaf in leaves.items() for t in range(1, len(name))}
    for token, row in losses.items():
        m, leaf = tokens[token]["m_t"], leaf_of[token]
        assert row["ppo.A"] == tokens[token]["A_t"]
        near((leaf["r"] - mean) / std, row["grpo.A"])
        near(-m * row["ppo.A"], row["ppo.c"])
        near(-m * row["grpo.A"], row["grpo.c"])
        near(2 * leaf["w"] * (V_star - leaf["r"]), row["apo.c"])
        sums["ppo"] -= m * row["ppo.A"]
        sums["grpo"] -= m * row["grpo.A"]
    sums["apo"] = sum(leaf["w"] * (V_star - leaf["r"]) ** 2 for leaf in leaves.values())
    for found, printed in zip(sums.values(), after(lines, "loss:  ppo")):
        near(found, printed, ulps=3)
    for kind in sums:
        for s, row in tables[kind][0].items():
            for a in LETTERS:
                own = [(token[-1], x[f"{kind}.c"]) for token, x in losses.items() if token.split("→")[0] == s]
                near(sum(c * ((a == b) - policy[s][f"π({a}|s)"]) for b, c in own), row[a])


def test_the_update_and_the_clip(walk):
    """Theta, pi and the ratios after one step, and what the clip leaves.  Guards against ascent instead of descent, and
    a clip that holds the side it should let go."""
    tables, lines = walk
    before, step = tables["s"]
    tokens, _, again = tables["token"]
    for s, row in step.items():
        for a in LETTERS:
            near(math.log(before[s][f"π({a}|s)"]) - 2 * tables["ppo"][0][s][a], row[f"θ({a})"])
            near(math.exp(row[f"θ({a})"]) / sum(math.exp(row[f"θ({b})"]) for b in LETTERS), row[f"π({a}|s)"])
    loss = 0.0
    for token, row in again.items():
        (s, a), m = token.split("→"), tokens[token]["m_t"]
        near(step[s][f"π({a}|s)"] / before[s][f"π({a}|s)"], row["ratio"], ulps=6)  # .085/.100: a digit less
        held = row["A"] > 0 and row["ratio"] > 1.2 or row["A"] < 0 and row["ratio"] < 0.8
        near(0 if held else -m * row["ratio"] * row["A"], row["c"])
        loss -= m * min(row["ratio"] * row["A"], min(max(row["ratio"], 0.8), 1.2) * row["A"])
    assert any(row["c"] == 0 for row in again.values()) and any(row["c"] != 0 for row in again.values())
    near(loss, after(lines[::-1], "loss:  ppo")[0])
    product = lambda table: table["x"]["π(b|s)"] * table["xb"]["π(.|s)"]
    for table, printed in zip((before, step), after(lines, "π(b.) = π(b|x) π(.|xb):")):
        near(product(table), printed)
    assert product(step) > product(before)


def test_the_readme_quotes_it(output):
    """Guards against a quotation that rots."""
    section = (ROOT / "README.md").read_text().split("\n## The walk\n")[1].split("\n## ")[0]
    quoted = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert quoted and all(block in output for block in quoted)
