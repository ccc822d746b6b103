"""policy.py -- the policy: loading it, scoring tokens with it, and the losses that improve it.

Every loss is a pure function of tensors that returns (loss, metrics), both as *sums* of weighted terms: the caller has
divided the weights by a total counted over the whole batch, so that micro-batches and ranks simply add up.

    ppo    clipped ratio with GAE advantages              Schulman et al. 2017, arXiv 1707.06347, eq. 7
    grpo   the same with group-normalised rewards         Shao et al. 2024, arXiv 2402.03300, sec. 4.1, no KL term
    em     the same, leaves weighted towards pi*          Dayan & Hinton 1997; Abdolmaleki et al. 2018, arXiv 1806.06920
    apo    regression on the optimal advantage            Brantley, Gao et al. 2025, arXiv 2505.20686

What the ratio corrects, and what it does not.  pi_theta/pi_old corrects for the policy having moved since the rollouts
were made.  It does not make the leaves of a search samples of pi_old: a search without replacement returns likely
completions less often than sampling would, and rare ones more.  That is what the leaf weights pi/q are for; with them
each sum over leaves estimates an expectation under pi_old.  The apo loss needs neither, where its conditions hold: at
the optimum its residual vanishes for every completion, whoever proposed it.

Grid: index t of everything (B, T-1) is about the token at t+1 of tokens (B, T).

    python policy.py        # scores a tiny random model both ways and checks the losses by hand
"""

import contextlib
import logging as python_logging
import os

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

# ======================================================================================================= loading
@contextlib.contextmanager
def one_sentence(what):
    """Whatever fails inside becomes a ValueError of one line: no network, no such repository, broken JSON, ..."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"{what} ({type(error).__name__}: {first[:180]})") from None


def read_config(name):
    """The config of a Hugging Face model, from a folder or a hub id, without dropout.  Remote code is never run.
    Raises ValueError with one sentence that says what is missing."""
    logging.disable_progress_bar()
    python_logging.getLogger("huggingface_hub").setLevel(python_logging.ERROR)  # its retries are not our sentence
    if os.path.isfile(name):
        raise ValueError(f"--model {name}: this is a file; give the model's folder or a hub id")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"--model {name}: the folder has no config.json, so it is not a Hugging Face model folder")
    if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"--model {name}: there is no such folder, and it is not a hub id such as Qwen/Qwen2.5-3B")
    with one_sentence(f"--model {name}: its config cannot be had"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # Dropout would make pi_theta differ from pi_old before any update: the ratio would be noise.
    text = config.get_text_config()
    for key in [key for key, x in vars(text).items() if "drop" in key and isinstance(x, float)]:
        setattr(text, key, 0.0)
    return config


def load_tokenizer(name):
    """The tokenizer of a folder or a hub id.  Raises ValueError."""
    with one_sentence(f"--model {name}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        assert len(tokenizer("1*1=")["input_ids"]) > 0, "it gives no tokens for '1*1='"
    return tokenizer


def load_policy(name, dtype=torch.float32, device="cpu", gradient_checkpointing=False, freeze_blocks=0):
    """A Hugging Face causal language model and its tokenizer, from a folder or a hub id.

    freeze_blocks: the embeddings and the first n blocks get no gradient.  Remote code is never run; weights are
    safetensors.  Raises ValueError with one sentence that says what is missing.
    """
    config = read_config(name)
    safe = dict(trust_remote_code=False, use_safetensors=True)
    with one_sentence(f"--model {name}: not a causal language model with safetensors weights"):
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **safe)
    tokenizer, size = load_tokenizer(name), config.get_text_config().vocab_size
    if not stop_tokens(model, tokenizer):
        raise ValueError(f"--model {name}: neither its config nor its tokenizer names an end-of-sequence token")
    if len(tokenizer) > size:  # fewer are common: embeddings are padded to a round number
        raise ValueError(f"--model {name}: the tokenizer has {len(tokenizer)} tokens, more than the model's {size}")
    freeze(model.to(device).eval(), freeze_blocks)
    if gradient_checkpointing:
        # transformers 5.23 renamed the method; both names take the same argument
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model, tokenizer


def freeze(model, blocks):
    """Keep the embeddings and the first n blocks as they are; n = 0: nothing.  Returns the model."""
    if blocks > len(blocks_of(model)):
        raise ValueError(f"--freeze-blocks {blocks}: the model has only {len(blocks_of(model))} blocks")
    for part in (model.get_input_embeddings(), *blocks_of(model)[:blocks]) if blocks else ():
        part.requires_grad_(False)
    return model


def blocks_of(model):
    """The transformer's blocks: the longest ModuleList below the backbone."""
    lists = [module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def stop_tokens(model, tokenizer):
    """Ids that end a completion: the generation config's and the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = set(given if isinstance(given, (list, tuple)) else [given]) | {tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))


def check_context(model, prompt_tokens, max_new_tokens):
    """Raise ValueError if the longest prompt and its completion do not fit into the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and prompt_tokens + max_new_tokens > context:
        longest = f"the longest prompt ({prompt_tokens} tokens) plus --max-new-tokens {max_new_tokens}"
        raise ValueError(f"{longest} does not fit into the model's context of {context} tokens")


# ======================================================================================================= scoring
def score(model, tokens, mask, max_logits=1 << 24):
    """Score the tokens of a batch under the model as it is now.

    tokens (B, T) padded on the right; mask (B, T-1) True where the token at t+1 counts.
    Returns log pi (B, T-1), entropy (B, T-1) of the distribution each token came from, both float32 and zero off the
    mask, and hidden (B, T-1, D), the last hidden state of the prefix before each token (input of the value head).

    The output layer runs only where the mask is, in chunks of at most max_logits numbers that are recomputed in the
    backward pass: no (B, T, V) tensor is ever made.
    """
    B, T = tokens.shape
    assert mask.shape == (B, T - 1)
    # Padding is on the right and the mask causal, so no real token sees padding: nothing to mask.  The ones say so.
    # The prefix before token t+1 ends at t, so nobody needs the hidden state of the last token.
    prefixes = dict(input_ids=tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1]))
    hidden = model.base_model(**prefixes, use_cache=False).last_hidden_state  # (B, T-1, D)
    rows, targets = hidden[mask], tokens[:, 1:][mask]  # (M, D), (M,)
    lm_head = model.get_output_embeddings()

    def chunk_scores(rows, targets):
        logits = lm_head(rows).float()  # (m, V)
        log_z = logits.logsumexp(dim=-1)
        logp = logits.gather(1, targets[:, None]).squeeze(1) - log_z
        # H = -sum_a pi log pi = log Z - sum_a pi(a) logit(a)
        return logp, log_z - (torch.exp(logits - log_z[:, None]) * logits).sum(dim=-1)

    size = max(1, max_logits // lm_head.weight.shape[0])
    chunks = list(zip(rows.split(size), targets.split(size)))
    if len(chunks) > 1 and torch.is_grad_enabled():
        scores = [checkpoint(chunk_scores, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        scores = [chunk_scores(*chunk) for chunk in chunks]
    grid = lambda column: torch.zeros(mask.shape, device=tokens.device).masked_scatter(mask, torch.cat(column))
    logp, entropy = map(grid, zip(*scores))
    return logp, entropy, hidden


# ================================================================================================== leaf weights
def normalise_weights(weight, problem):
    """Leaf weights (B,) that sum to one within each problem: the self-normalised estimate, consistent though no longer
    unbiased, in which every problem counts alike.  problem (B,) integers."""
    return weight / torch.bincount(problem, weight)[problem]


def variance_sums(values, returns, weight):
    """Sums for explained_variance, to be added up over ranks; tensors of one shape -> dict of numbers."""
    w, r, e = weight.double(), returns.double(), (returns - values).double()
    sums = {"w": w, "r": w * r, "rr": w * r * r, "e": w * e, "ee": w * e * e}
    return {name: x.sum().item() for name, x in sums.items()}


def explained_variance(sums):
    """1 - Var(return - V)/Var(return) from `variance_sums`: 1 is a perfect critic, 0 one that knows no more than the mean.
    None where all returns are the same."""
    w = sums["w"] or 1.0
    variance = lambda x: sums[x + x] / w - (sums[x] / w) ** 2  # E x^2 - (E x)^2; "ee" is the sum of e^2
    return 1.0 - variance("e") / variance("r") if variance("r") > 1e-12 else None


# ======================================================================================================== losses
def grpo_advantages(rewards, weight, problem):
    """A_i = (r_i - mean of its problem) / (standard deviation + 1e-6), mean and deviation weighted.  All (B,)."""
    r, w = rewards.double(), weight.double()  # equal rewards must be centred to 0, not to some 1e-7
    mean = lambda x: (torch.bincount(problem, w * x) / torch.bincount(problem, w))[problem]
    centred = r - mean(r)
    return (centred / (mean(centred**2).sqrt() + 1e-6)).to(rewards.dtype)


def em_advantages(targets, weight, problem):
    """The M-step of EM policy search: maximise E_{pi*}[log pi_theta] over the leaves that were found.  All (B,).

    targets = value.soft_target(r), so that exp(r/beta) ~ targets where r_lo/beta is far below; weight: leaf weights that
    sum to one within each problem.  Times weight, A is the posterior pi*(leaf | the leaves found) times the best target
    of its problem: a right completion counts alike however unlikely pi thinks it is (the gradient of log E exp(r/beta),
    where that of E r is as small as pi), and a problem with nothing but wrong leaves teaches next to nothing.
    """
    Z = torch.bincount(problem, weight * targets)
    best = torch.zeros(len(Z), dtype=targets.dtype).scatter_reduce(0, problem, targets, "amax")
    # A = exp((r - V*(x))/beta), exp(V*(x)/beta) = sum_i w_i exp(r_i/beta);  times the best target
    return best[problem] * targets / Z[problem].clamp(min=torch.finfo(targets.dtype).tiny)


def ppo_loss(logp, old_logp, advantages, entropy, token_weights, clip=0.2, entropy_coef=0.0):
    """PPO-clip with an entropy bonus; everything (B, T-1), token_weights zero off the mask."""
    ratio = (logp - old_logp).exp()  # pi_theta(a|s) / pi_old(a|s)
    # L = -min( ratio A, clip(ratio, 1 - eps, 1 + eps) A ) - c H
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    bonus = entropy_coef * entropy if entropy_coef else 0.0  # 0 times it would still be differentiated, over all of V
    loss = -((surrogate + bonus) * token_weights).sum()
    return loss, {"policy_loss": -(surrogate * token_weights).sum().detach()}


@torch.no_grad()
def ratio_metrics(logp, old_logp, entropy, token_weights, clip=0.2):
    """How far the policy has moved since the rollouts, for any loss; arguments as in ppo_loss."""
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    return {
        # KL(pi_old | pi_theta) ~ (ratio - 1) - log ratio, never negative (Schulman 2020, "k3")
        "approx_kl": ((ratio - 1 - log_ratio) * token_weights).sum(),
        "clip_fraction": (((ratio - 1).abs() > clip) * token_weights).sum(),
        "entropy": (entropy * token_weights).sum(),
    }


def optimal_value(rewards, beta1):
    """V*(x) = beta1 log mean exp(r/beta1) over samples of the reference policy; rewards (..., n) -> (...)."""
    return beta1 * (torch.logsumexp(rewards / beta1, dim=-1) - torch.tensor(float(rewards.shape[-1])).log())


def apo_loss(logp, ref_logp, mask, rewards, optimal_values, beta2, leaf_weights):
    """Optimal-advantage regression.  logp, ref_logp, mask (B, T-1); rewards, optimal_values = V*(x), leaf_weights (B,).

    beta2 log(pi_theta/pi_ref)(y) is regressed on r - V*, the advantage under the optimal policy, to which it is equal
    for every y when pi_theta = pi* (with beta1 = beta2).
    """
    log_ratio = ((logp - ref_logp) * mask).sum(dim=1)  # (B,)  log pi_theta(y|x) - log pi_ref(y|x)
    # L = mean ( beta2 log(pi_theta/pi_ref) + V*(x) - r )^2
    residual = beta2 * log_ratio + optimal_values - rewards
    loss = (residual**2 * leaf_weights).sum()
    return loss, {"policy_loss": loss.detach()}


# ========================================================================================================== demo
def main():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    tokens, mask = torch.randint(40, (3, 9)), torch.arange(8).expand(3, 8) >= 3  # a prompt of four tokens
    logp, entropy, _ = score(model, tokens, mask, max_logits=80)  # two tokens a chunk
    full = F.log_softmax(model(tokens).logits[:, :-1], dim=-1)  # (B, T-1, V)
    exact, H = full.gather(2, tokens[:, 1:, None]).squeeze(2), -(full.exp() * full).sum(-1)
    worst = max((logp - exact * mask).abs().max(), (entropy - H * mask).abs().max())
    print(f"log pi and entropy in chunks against the full (B, T, V) computation: off by at most {worst:.1e}")
    assert worst < 1e-5

    # One token, ratio 1.5: with A = +1 the clip at 1.2 holds, and its gradient is zero; with A = -1 it does not.
    for advantage, expected, gradient in ((1.0, -1.2, 0.0), (-1.0, 1.5, 1.5)):
        new = torch.tensor([[1.5]]).log().requires_grad_()
        one = torch.ones(1, 1)
        loss, _ = ppo_loss(new, torch.zeros(1, 1), advantage * one, 0 * one, one)
        loss.backward()
        print(f"ratio 1.5, A = {advantage:+.0f}: loss {loss.item():+.2f}, gradient {new.grad.item():+.2f}")
        assert abs(loss.item() - expected) < 1e-6 and abs(new.grad.item() - gradient) < 1e-6

    # Two completions with pi = (.8, .2) and r = (-1, 1), beta = 1: at pi* ~ pi exp(r) the apo residual is zero.
    pi, r = torch.tensor([0.8, 0.2]), torch.tensor([-1.0, 1.0])
    best = torch.softmax(pi.log() + r, dim=0)
    V = torch.logsumexp(pi.log() + r, dim=0).expand(2)
    loss, _ = apo_loss(best.log()[:, None], pi.log()[:, None], torch.ones(2, 1), r, V, 1.0, torch.full((2,), 0.5))
    print(f"apo at the optimal policy {[round(p, 3) for p in best.tolist()]}: loss {loss:.1e}")
    assert loss < 1e-10


if __name__ == "__main__":
    main()
