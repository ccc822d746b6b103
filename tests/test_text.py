"""The reward reads exactly what the model wrote after the prompt, whatever the tokenizer.

Each tokenizer is built here: byte-level, with spaces as a piece of their own (Metaspace, Llama),
and of words and their ends (WordPiece).  The tags of the answer are special tokens, added tokens or
ordinary pieces.
"""

import json
import random
import shutil

import pytest
import transformers
from conftest import ROOT
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import astar_search
import data
import eval as evaluation
import fsdp
import policy
import reward
import train

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = "0123456789*=+-.<>/()|abcdefghijklmnopqrstuvwxyz"
REWARD = reward.Reward()
PROBLEM = data.Problem("34*12=", 408)
PREFILLED = data.Problem("34*12=", 408, prefill="<answer>4")

# ----------------------------------------------------------------------------- The tokenizers built


def byte_level(pieces):
    """GPT-2 and Qwen: a piece is a run of bytes, so that one may be a part of a character."""
    vocabulary = list(pieces) + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġ4", "40"]
    tokenizer = Tokenizer(models.BPE(numbered(vocabulary), [("Ġ", "4"), ("4", "0")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(pieces, prepend="always"):
    """A space is the character ▁.  prepend: whether one stands before a text that has none."""
    vocabulary = ["<unk>", *pieces, "▁", *CHARACTERS, "▁0", "▁08", "08", "▁="]
    merges = [("▁", "0"), ("0", "8"), ("▁0", "8"), ("▁", "=")]
    tokenizer = Tokenizer(models.BPE(numbered(vocabulary), merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return tokenizer


def metaspace_first(pieces):
    """With a space only before the first word of a text."""
    return metaspace(pieces, prepend="first")


def metaspace_never(pieces):
    """Without a space before the text."""
    return metaspace(pieces, prepend="never")


def llama(pieces):
    """Llama 2: the normalizer puts the space there, the decoder strips it; a rest in bytes."""
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ["<unk>", *pieces, *in_bytes, "▁", *CHARACTERS, "▁0", "08", "▁08"]
    merges = [("▁", "0"), ("0", "8"), ("▁0", "8")]
    model = models.BPE(numbered(vocabulary), merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def word_piece(pieces):
    """BERT: '##' is the mark of a piece that goes on with a word."""
    vocabulary = ["<unk>", *pieces, *CHARACTERS, "408", *("##" + c for c in CHARACTERS), "##08"]
    model = models.WordPiece(numbered(vocabulary), unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def suffixed(pieces):
    """The first GPT: a piece that ends a word carries '</w>'."""
    ends = [c + "</w>" for c in CHARACTERS]
    model = models.BPE(
        numbered(["<unk>", *pieces, *CHARACTERS, *ends, "08</w>"]),
        [],
        unk_token="<unk>",
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "Metaspace always": metaspace,
    "Metaspace first": metaspace_first,
    "Metaspace never": metaspace_never,
    "Llama": llama,
    "WordPiece": word_piece,
    "suffix": suffixed,
}
SPACED = ("Metaspace always", "Metaspace first", "Llama")  # they drop the first space


def numbered(pieces):
    """The vocabulary {piece: id}, each piece once."""
    return {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}


def build(kind, tags="special", roles=("pad", "bos", "eos"), template=None, more=()):
    """A transformers tokenizer.

    tags: "special", "added" or "ordinary" tokens; roles: those that it has of pad, bos and eos.
    template: what it makes of a text $A by itself.  more: further special tokens.
    """
    tokenizer = KINDS[kind](TAGS if tags == "ordinary" else ())
    names = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
    specials = [names[role] for role in roles]
    tokenizer.add_special_tokens([*specials, *more])
    if tags == "special":
        tokenizer.add_special_tokens(list(TAGS))
    if tags == "added":
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    if template:
        known = [(token, tokenizer.token_to_id(token)) for token in specials]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=known
        )
    of_role = {f"{role}_token": names[role] for role in roles}
    if kind != "byte-level":
        of_role["unk_token"] = "<unk>"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **of_role)


def ids_of(tokenizer, pieces):
    """The ids of pieces; an int among them is an id already."""
    ids = []
    for piece in pieces:
        id = piece if isinstance(piece, int) else tokenizer.convert_tokens_to_ids(piece)
        assert id is not None and tokenizer.convert_ids_to_tokens(id) != "<unk>" or piece == "<unk>"
        ids.append(id)
    return ids


def judge(tokenizer, problem, pieces, truncated=False):
    """(text, verdict) of a completion of these pieces."""
    (prompt_ids,) = evaluation.encode_prompts(tokenizer, [problem])
    return evaluation.judge_completion(
        problem=problem,
        prompt_ids=prompt_ids,
        ids=ids_of(tokenizer, pieces),
        truncated=truncated,
        tokenizer=tokenizer,
        reward=REWARD,
        max_new_tokens=48,
    )


def decode(tokenizer, ids):
    """The text of ids, nothing left out."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


every_kind = pytest.mark.parametrize("kind", KINDS)
every_way_of_tags = pytest.mark.parametrize("tags", ("special", "added", "ordinary"))

# ------------------------------------------------------------------- Prompt + completion = the text

ROLES = {
    "all roles": ("pad", "bos", "eos"),
    "no pad": ("bos", "eos"),
    "no bos": ("pad", "eos"),
    "eos alone": ("eos",),
    "no role": (),
}
TEMPLATES = {"all roles": "<s> $A", "no pad": "<s> $A </s>", "no bos": "$A </s>"}


@every_kind
@every_way_of_tags
@pytest.mark.parametrize("roles", ROLES)
def test_prompt_and_what_the_reward_reads_make_up_the_whole_text(kind, tags, roles):
    """Guards against completions decoded alone: the first space was lost, and special tokens."""
    tokenizer = build(kind, tags, ROLES[roles], TEMPLATES.get(roles))
    rng = random.Random(f"{kind} {tags} {roles}")
    for number in range(200):
        problem = rng.choice((PROBLEM, PREFILLED, data.Problem("3 = x, ", 3, prefill="<think> ")))
        (prompt,) = evaluation.encode_prompts(tokenizer, [problem])
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))]
        truncated = "eos" not in ROLES[roles] or number % 2 == 0
        end = [] if truncated else [tokenizer.eos_token_id]
        text, _ = evaluation.judge_completion(
            problem=problem,
            prompt_ids=prompt,
            ids=ids + end,
            truncated=truncated,
            tokenizer=tokenizer,
            reward=REWARD,
            max_new_tokens=48,
        )
        assert text.startswith(problem.prefill)
        written = text.removeprefix(problem.prefill)
        assert decode(tokenizer, prompt + ids) == decode(tokenizer, prompt) + written


@every_kind
@every_way_of_tags
def test_a_right_answer_earns_all(kind, tags):
    """Guards against tags that vanish because they are special tokens: right answers earned -1."""
    tokenizer = build(kind, tags)
    digits = ["408"] if kind == "WordPiece" else ["4", "0", "8"]
    text, verdict = judge(tokenizer, PROBLEM, ["<answer>", *digits, "</answer>", "</s>"])
    assert verdict["reward"] == 1.1, text
    thought = ["<think>", "4", "</think>", "<answer>", *digits, "</answer>", "</s>"]
    text, verdict = judge(tokenizer, PROBLEM, thought)
    assert verdict["reward"] == 1.1, text
    # The same tokens without the end are truncated, and a tag too many is seen.
    _, verdict = judge(tokenizer, PROBLEM, ["<answer>", *digits, "</answer>"], truncated=True)
    assert verdict["reward"] == -1
    extra = ["<answer>", *digits, "</answer>", "<think>", "</s>"]
    assert judge(tokenizer, PROBLEM, extra)[1]["reward"] == 1.0


@pytest.mark.parametrize("kind", SPACED)
def test_the_first_space_of_a_completion_is_read(kind):
    """Guards against a decoder that drops it: '<answer>4' and ' 08' were read as 408."""
    tokenizer = build(kind)
    for pieces in (["▁", "08"], ["▁08"], ["▁0", "8"]):
        text, verdict = judge(tokenizer, PREFILLED, [*pieces, "</answer>", "</s>"])
        assert text == "<answer>4 08</answer>"
        assert verdict["reward"] == -1 and verdict["answer"] is None
    text, verdict = judge(tokenizer, PREFILLED, ["08", "</answer>", "</s>"])
    assert text == "<answer>408</answer>" and verdict["reward"] == 1.1


def test_the_marks_of_word_pieces_are_read():
    """Guards against a first '##08' that is decoded alone, as the characters ##08."""
    tokenizer = build("WordPiece", tags="added")
    text, verdict = judge(tokenizer, PREFILLED, ["##08", "</answer>", "</s>"])
    assert text == "<answer>408 </answer>" and verdict["reward"] == 1.1
    text, verdict = judge(tokenizer, PREFILLED, ["0", "##8", "</answer>", "</s>"])
    assert text == "<answer>4 08 </answer>" and verdict["reward"] == -1


# ------------------------------------------------------------------------------ Parts of characters


def test_a_completion_may_begin_and_end_inside_a_character():
    """Guards against a cut at the wrong place where half a character is U+FFFD."""
    tokenizer = build("byte-level")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (euro,) = [text for text, _ in alphabet.pre_tokenize_str("€")]
    first, second, third = euro
    problem = data.Problem("3€=", 3)
    assert judge(tokenizer, problem, [first, second, third, "4", "</s>"])[0] == "€4"
    assert judge(tokenizer, problem, [third, "4", first, second, "</s>"])[0] == "\ufffd4\ufffd"
    assert judge(tokenizer, problem, [first, "<pad>", second, "</s>"])[0] == "\ufffd<pad>\ufffd"
    # An id without text stands between the parts of a character: they make no character.
    beyond = len(tokenizer) + 1
    text, _ = judge(tokenizer, problem, [first, beyond, second, third, "4", "</s>"])
    assert text == f"\ufffd<token {beyond}>\ufffd\ufffd4"


def test_a_byte_that_spoils_the_prompt_is_read_and_nothing_else():
    """Guards against a cut by length: Llama replaces the whole run of bytes by U+FFFD."""
    tokenizer = build("Llama")
    problem = data.Problem("3=€", 3)
    (prompt,) = evaluation.encode_prompts(tokenizer, [problem])
    bad = ids_of(tokenizer, ["<0xE2>"])
    assert decode(tokenizer, prompt) == "3=€"
    assert decode(tokenizer, prompt + bad) == "3=\ufffd\ufffd\ufffd\ufffd"
    assert judge(tokenizer, problem, ["<0xE2>", "4", "▁0", "</s>"])[0] == "\ufffd4 0"
    whole = ["<0xE2>", "<0x82>", "<0xAC>", "4", "</s>"]
    assert judge(tokenizer, problem, whole)[0] == "€4"
    # The whole prompt in bytes: then the completion is decoded alone.
    assert judge(tokenizer, data.Problem("€", 3), ["<0xAC>", "4", "</s>"])[0] == "\ufffd4"


# -------------------------------------------------------------------------------------- End tokens


@every_kind
@every_way_of_tags
def test_an_end_token_that_is_a_tag_is_read(kind, tags):
    """Guards against `</answer>` in the list of end tokens, dropped before the reward reads it."""
    digits = ["408"] if kind == "WordPiece" else ["4", "0", "8"]
    text, verdict = judge(build(kind, tags), PROBLEM, ["<answer>", *digits, "</answer>"])
    assert text.rstrip().endswith("</answer>") and verdict["reward"] == 1.1


def test_an_end_token_with_the_role_of_eos_that_is_a_tag_is_read():
    """The same where it is the only end token, by its role."""
    tokenizer = build("byte-level", "special", roles=())
    tokenizer.eos_token = "</answer>"
    _, verdict = judge(tokenizer, PROBLEM, ["<answer>", "4", "0", "8", "</answer>"])
    assert verdict["reward"] == 1.1


@every_kind
def test_a_control_token_that_ends_a_completion_is_no_text(kind):
    """Guards against <|im_end|> behind an answer, which would cost the format's bonus."""
    ends = ("<|im_end|>", "<end_of_turn>")
    tokenizer = build(kind, "added", more=ends)
    digits = ["408"] if kind == "WordPiece" else ["4", "0", "8"]
    beyond = len(tokenizer) + 3
    for end in (*ends, "</s>", "<pad>", "<s>", beyond):
        text, verdict = judge(tokenizer, PROBLEM, ["<answer>", *digits, "</answer>", end])
        assert text.rstrip().endswith("</answer>") and verdict["reward"] == 1.1
        # Only the last token is an end.  Before it such a token was written by the model.
        text, verdict = judge(tokenizer, PROBLEM, ["<answer>", *digits, "</answer>", end, "</s>"])
        assert not text.rstrip().endswith("</answer>") and verdict["reward"] == 1.0


def test_an_ordinary_end_token_is_text():
    """Guards against a line break or a full stop in the list of end tokens that vanishes."""
    tokenizer = build("byte-level")
    answer = ["<answer>", "4", "0", "8", "</answer>"]
    text, verdict = judge(tokenizer, PROBLEM, [*answer, "Ċ"])
    assert text.endswith("</answer>\n") and verdict["reward"] == 1.1
    text, verdict = judge(tokenizer, PROBLEM, [*answer, "."])
    assert text.endswith("</answer>.") and verdict["reward"] == 1.0
    # A truncated completion has no end token: all of it was written.
    text, _ = judge(tokenizer, PROBLEM, ["4", "</s>", "<pad>"], truncated=True)
    assert text == "4</s><pad>"


# --------------------------------------------------------------------------- Tokens without a text


@every_kind
@every_way_of_tags
def test_no_token_inside_an_answer_vanishes(kind, tags):
    """Guards against 4<pad>0<pad>8, or ids of padded embeddings in between: 408 was read."""
    tokenizer = build(kind, tags)
    beyond = len(tokenizer) + 5
    between = ["<pad>", "<s>", "</s>", beyond, 10**6]
    if kind != "byte-level":
        between.append("<unk>")
    mark = "##" if kind == "WordPiece" else ""
    for token in between:
        pieces = ["<answer>", "4", token, mark + "0", token, mark + "8", "</answer>", "</s>"]
        text, verdict = judge(tokenizer, PROBLEM, pieces)
        assert verdict["reward"] == -1 and verdict["answer"] is None, text
        assert text.count(str(token)) == 2


def test_an_id_without_text_is_marked_where_it_stands():
    """Guards against a piece that decodes to nothing: '' and a lone '##'."""
    words = Tokenizer(models.WordLevel(numbered(["<unk>", "", "1", "4"]), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert evaluation.completion_text(tokenizer, [2], [3, 1, 3, 9]) == "4<token 1>4<token 9>"

    pieces = Tokenizer(models.WordPiece(numbered(["<unk>", "1", "##", "##4"]), unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert evaluation.completion_text(tokenizer, [1], [3, 2, 3]) == "4<token 2>4"


class Letters(transformers.PreTrainedTokenizer):
    """A tokenizer written in Python, which raises for an id that it does not know."""

    @property
    def vocab_size(self):
        return len(CHARACTERS)

    def get_vocab(self):
        return {letter: id for id, letter in enumerate(CHARACTERS)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return CHARACTERS.index(token)

    def _convert_id_to_token(self, index):
        return CHARACTERS[index]

    def convert_tokens_to_string(self, tokens):
        """The letters in a row."""
        return "".join(tokens)


def test_a_tokenizer_in_python_may_raise_for_an_unknown_id():
    """Guards against its IndexError in the middle of a run."""
    tokenizer = Letters()
    prompt = tokenizer("34*12=")["input_ids"]
    assert evaluation.completion_text(tokenizer, prompt, [4, 999, 0, 8]) == "4<token 999>08"


# ----------------------------------------------------------------------------------------- Prompts


@every_kind
@pytest.mark.parametrize("text", ("34*12=", "<s>34*12="))
def test_a_prompt_has_one_bos_and_no_eos(kind, text):
    """Guards against an EOS behind the prompt, and a BOS that is both spelled and added."""
    without = build(kind)(text)["input_ids"]
    problem = data.Problem(text, 408)
    bos, eos = ids_of(build(kind), ["<s>", "</s>"])
    for template in (None, "$A </s>", "$A </s> </s>"):
        tokenizer = build(kind, template=template)
        assert evaluation.encode_prompts(tokenizer, [problem]) == [without]
    for template in ("<s> $A", "<s> $A </s>", "<s>:0 $A:0 </s>:0"):
        tokenizer = build(kind, template=template)
        (prompt,) = evaluation.encode_prompts(tokenizer, [problem])
        assert prompt.count(bos) == 1 and prompt[0] == bos and eos not in prompt
        assert prompt[1:] == [token for token in without if token != bos]
    # What the text itself spells stays: a few-shot prompt may hold and end with an EOS.
    shots = data.Problem("1*1=1</s>34*12=</s>", 408)
    (prompt,) = evaluation.encode_prompts(build(kind, template="$A </s>"), [shots])
    assert prompt == build(kind)(shots.text)["input_ids"] and prompt.count(eos) == 2


def test_several_tokens_in_front_are_not_doubled():
    """The same for a template of two tokens (GLM), of which the text spells one, both or none."""
    tokenizer = build("byte-level", template="<pad> <s> $A </s>")
    pad, bos = ids_of(tokenizer, ["<pad>", "<s>"])
    for text in ("3", "<s>3", "<pad><s>3"):
        (prompt,) = evaluation.encode_prompts(tokenizer, [data.Problem(text, 3)])
        assert prompt == [pad, bos, *ids_of(tokenizer, ["3"])]


@pytest.mark.parametrize("roles", (("pad", "eos"), ("eos",)))
def test_a_prompt_does_not_depend_on_padding_or_truncation(roles):
    """Guards against what tokenizer.json may switch on, and against pad = eos."""
    tokenizer = build("byte-level", roles=roles, template="$A </s>")
    if roles == ("eos",):
        tokenizer.pad_token = "</s>"
    problems = [PROBLEM, data.Problem("3=", 3)]
    plain = evaluation.encode_prompts(tokenizer, problems)
    assert [len(prompt) for prompt in plain] == [6, 2]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        tokenizer.backend_tokenizer.enable_padding(length=12, direction=side)
        tokenizer.backend_tokenizer.enable_truncation(3)
        assert evaluation.encode_prompts(tokenizer, problems) == plain


def test_a_prompt_without_tokens_is_refused():
    """Guards against a BOS alone that stands for a prompt of unknown characters."""
    tokenizer = build("suffix", template="<s> $A")
    with pytest.raises(ValueError, match="no tokens for the prompt '  '"):
        evaluation.encode_prompts(tokenizer, [data.Problem("  ", 1)])


class Shifting(Letters):
    """It encodes a text otherwise when it adds its special tokens."""

    def __call__(self, text, add_special_tokens=True, **options):
        """The ids of the letters, or of the letters after them."""
        ids = super().__call__(text, add_special_tokens=False, **options)["input_ids"]
        return {"input_ids": [token + add_special_tokens for token in ids]}


def test_a_tokenizer_that_changes_the_prompt_is_refused():
    """Guards against a search for the prompt's tokens that never ends, or ends anywhere."""
    with pytest.raises(ValueError, match="it splits the prompt '34[*]12=' differently"):
        evaluation.encode_prompts(Shifting(), [PROBLEM])


def unknown(tokenizer, problems):
    """What check_known says, or "" if it says nothing."""
    try:
        evaluation.check_known(tokenizer, problems)
    except ValueError as error:
        return str(error)
    return ""


def test_prompts_of_unknown_tokens_are_refused():
    """Guards against a run on prompts that all look alike to the model."""
    hard = data.Problem("日本は1=", 1)
    half = data.Problem("日=", 1)  # one of two characters
    problems = [PROBLEM, hard, half, half]
    for kind in ("Metaspace always", "Metaspace never", "suffix"):
        tokenizer = build(kind, template="<s> $A")
        assert unknown(tokenizer, problems) == (
            "3 of 4 prompts hold what the model's tokenizer does not know, such as '日本は1=': "
            "'は', '日', '本'"
        )
        assert unknown(tokenizer, problems[:1]) == ""
    for kind in ("byte-level", "Llama"):
        assert unknown(build(kind), problems) == ""

    # The token is not named by the tokenizer, or one stands for several characters, or there is
    # none and the characters are left out.
    for token, fuse, n in (("<unk>", False, 3), ("<unk>", True, 3), (None, False, 1)):
        vocabulary = numbered(["<unk>", *"0123456789=*"])
        pieces = Tokenizer(models.BPE(vocabulary, [], unk_token=token, fuse_unk=fuse))
        pieces.decoder = decoders.Fuse()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces)
        sentence = unknown(tokenizer, problems)
        assert sentence.startswith(f"{n} of 4") and sentence.endswith(": 'は', '日', '本'")


def test_words_are_known_though_their_characters_are_not():
    """Guards against a false alarm where tokens are whole words, and against silence there."""
    known = data.Problem("34 =", 3)
    strange = data.Problem("34 56 78", 3)
    for token in ("<unk>", None):
        words = Tokenizer(models.WordLevel(numbered(["<unk>", "34", "="]), unk_token=token))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        assert unknown(tokenizer, [known]) == ""
        if token:
            sentence = unknown(tokenizer, [known, strange])
            assert sentence.startswith("1 of 2")
            assert sentence.endswith("'34 56 78': '5', '6', '7', '8'")


# ----------------------------------------------------------------------------------- Whole programs


def tiny_base(folder, change_tokenizer=None, end_tokens=None):
    """A copy of the tiny base with another tokenizer.json, or other end tokens."""
    shutil.copytree(ROOT / "tiny_base", folder, ignore=shutil.ignore_patterns("hard", "weak"))
    if change_tokenizer:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        change_tokenizer(tokenizer)
        path.write_text(json.dumps(tokenizer))
    if end_tokens:
        path = folder / "generation_config.json"
        generation = json.loads(path.read_text())
        generation["eos_token_id"] = end_tokens
        path.write_text(json.dumps(generation))
    return folder


def specials(tokenizer):
    """Make the tags of a tokenizer.json special tokens."""
    for token in tokenizer["added_tokens"]:
        token["special"] = True


def completions(folder, decoding):
    """Texts and rewards of the completions of 24 problems."""
    model, tokenizer = policy.load_policy(str(folder))
    problems = data.eval_problems(24, prefill="<think>")
    ranks = fsdp.init_ranks(device="cpu")
    _, found = evaluation.evaluate(
        model, tokenizer, problems, REWARD, ranks, decode=decoding, n=2, max_nodes=60
    )
    pairs = []
    for row in found:
        pairs += [(c["text"], c["reward"], c["truncated"]) for c in row["completions"]]
    return pairs


def test_the_tiny_base_reads_alike_with_special_tags_or_an_answer_that_ends(tmp_path):
    """Guards the ways through evaluate(): the prompt's ids and the end token are the right ones."""
    plain = completions(ROOT / "tiny_base", "greedy")
    assert sum(reward == 1.1 for _, reward, _ in plain) > 10
    assert completions(tiny_base(tmp_path / "special", specials), "greedy") == plain
    ended = completions(tiny_base(tmp_path / "end", specials, end_tokens=[1, 23]), "greedy")
    assert ended == plain  # </answer> is the token 23, and the end follows it at once


def test_a_search_that_stops_when_it_is_right_reads_the_same_text(tmp_path):
    """Guards right_leaf_test and judge_rollouts: both read with the prompt that was searched."""
    folder = tiny_base(tmp_path / "end", specials, end_tokens=[1, 23])
    model, tokenizer = policy.load_policy(str(folder))
    problems = data.eval_problems(12, prefill="<think>")
    prompts = evaluation.encode_prompts(tokenizer, problems)
    until = evaluation.right_leaf_test(tokenizer, problems, prompts, REWARD, max_new_tokens=48)
    options = astar_search.Options(
        eos=policy.stop_tokens(model, tokenizer), K=8, max_new_tokens=48, max_nodes=400, until=until
    )
    expander = astar_search.Expander(model, prompts, 48)
    trees = astar_search.search(astar_search.root_keys(0, 0, range(12)), expander, options)
    # README's snippet, with a tokenizer that has no padding.
    tokenizer.pad_token = None
    rollouts = astar_search.collect(trees, expander, tokenizer.pad_token_id)
    _, verdicts = evaluation.judge_rollouts(rollouts, tokenizer, problems, REWARD, 48)
    right = {p for p, v in zip(rollouts.problem.tolist(), verdicts) if v["correct"]}
    assert len(right) > 5
    assert right == {p for p, tree in enumerate(trees) if tree.stopped == "done"}


def test_unknown_prompts_are_refused_at_set_up(tmp_path, capsys):
    """Guards against a run that cannot read its problems, after a warning or none."""
    path = tmp_path / "task.jsonl"
    line = json.dumps({"prompt": "é日本=", "answer": 3})
    path.write_text(line + "\n" + line.replace("3", "4") + "\n")
    flags = ["--eval-file", str(path), "--max-new-tokens", "4", "--device", "cpu"]
    for main, n, more in (
        (evaluation.main, 2, []),
        (train.main, 4, ["--train-file", str(path), "--output-dir", str(tmp_path / "run")]),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*flags, *more])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert f"{n} of {n} prompts hold what the model's tokenizer does not know" in said
        assert "such as 'é日本=': 'é', '日', '本'" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
