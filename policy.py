"""policy.py -- the policy: loading it, scoring tokens with it, and the losses that improve it.

    ppo    clipped ratio with GAE advantages           Schulman et al. 2017, arXiv 1707.06347, eq. 7
    grpo   the same with group-normalised rewards      Shao et al. 2024, arXiv 2402.03300, sec. 4.1
    em     the same with leaves weighted towards pi*   Dayan & Hinton 1997;
                                                       Abdolmaleki et al. 2018, arXiv 1806.06920
    apo    regression on the optimal advantage         Brantley, Gao et al. 2025, arXiv 2505.20686

Every loss is a pure function of tensors that returns (loss, metrics).  Both are *sums* of weighted
terms.  The caller has divided the weights by a total counted over the whole batch, so micro-batches
and ranks simply add up.

Departures from the literature:

1. grpo has no KL term.
2. The rollouts of ppo, grpo and em can be leaves of a search instead of samples.  The ratio
   pi_theta/pi_old corrects only for the steps since the rollouts were made.  A search without
   replacement returns likely completions less often than sampling would, and rare ones more often.
   The leaf weights pi/q correct for that: a weighted sum over leaves estimates an expectation
   under pi_old.
3. apo needs neither the ratio nor the leaf weights where its conditions hold (see apo_loss).  At
   the optimum its residual is zero for every completion, whatever method found it.

Shapes: B rollouts, N problems, T tokens, V vocabulary, D hidden.  Index t of everything that is
(B, T-1) is about the token at t+1 of tokens (B, T).

    python policy.py        # scores tokens with a tiny random model, checks the losses by hand
"""

import contextlib
import logging
import os

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

# ------------------------------------------------------------------------------------------ Loading


@contextlib.contextmanager
def one_sentence(what):
    """Turn any exception of the block into a ValueError with a message of one line.

    The message is `what`, then in brackets the exception's type and the first line of its text.
    For calls that can fail in many ways: no network, no such repository, broken JSON, ...
    """
    try:
        yield
    except Exception as error:
        text = str(error).strip() or "no message"
        first_line = text.splitlines()[0][:180]
        raise ValueError(f"{what} ({type(error).__name__}: {first_line})") from None


def read_config(name):
    """The config of a Hugging Face model, from a folder or a hub id, without dropout.

    Remote code is never run.  Raises ValueError with one sentence that says what is missing.
    """
    transformers_logging.disable_progress_bar()
    # huggingface_hub logs each retry, and transformers a table of weights that do not fit.  The
    # user gets one sentence instead, here or from check_weights.
    for library in ("huggingface_hub", "transformers.modeling_utils", "transformers.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)

    if os.path.isfile(name):
        raise ValueError(
            f"--model {name}: this is a file; expected is a model's folder (config.json, "
            "model.safetensors, a tokenizer), a run's folder, or a hub id"
        )
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(
                f"--model {name}: the folder has no config.json, "
                "so it is not a Hugging Face model folder"
            )
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"--model {name}: there is no such folder, "
            "and it is not a hub id such as Qwen/Qwen2.5-3B"
        )
    nowhere = "" if os.path.isdir(name) else "there is no such folder, and "
    with one_sentence(f"--model {name}: {nowhere}its config cannot be had"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)

    # No dropout: with it pi_theta would differ from pi_old before any update, and the ratio would
    # be noise.  A list of the items, because the loop sets attributes.
    text_config = config.get_text_config()
    for key, number in list(vars(text_config).items()):
        if "drop" in key and isinstance(number, float):
            setattr(text_config, key, 0.0)
    return config


def load_tokenizer(name):
    """The tokenizer of a folder or a hub id.  Raises ValueError."""
    with one_sentence(f"--model {name}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if len(tokenizer("1*1=")["input_ids"]) == 0:
            raise ValueError("it gives no tokens for '1*1='")
    return tokenizer


SMALL_MODEL = 20_000_000  # parameters


def use_threads(model, threads=0):
    """Set the threads that PyTorch computes with on a CPU.

    threads: their number.  With 0, OMP_NUM_THREADS decides if it is set; otherwise a model below
    SMALL_MODEL parameters gets one, and a larger one what PyTorch takes, one a core.  What a small
    model computes at a time is too short to be shared, and on a machine that is busy with other
    work the threads wait for each other.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL
    if threads > 0:
        torch.set_num_threads(threads)
    elif small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def load_policy(
    name, dtype=torch.float32, device="cpu", gradient_checkpointing=False, freeze_blocks=0
):
    """A Hugging Face causal language model and its tokenizer, from a folder or a hub id.

    dtype: of the weights.
    gradient_checkpointing: recompute the activations of each block in the backward pass.
    freeze_blocks: the embeddings and the first n blocks get no gradient.

    Remote code is never run, and the weights must be safetensors.
    Returns (model, tokenizer), the model in evaluation mode.
    Raises ValueError with one sentence that says what is missing.
    """
    config = read_config(name)
    with one_sentence(f"--model {name}: not a causal language model with safetensors weights"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # check_weights says it in one sentence
            output_loading_info=True,
        )
    check_weights(name, model, loading)
    lm_head = model.get_output_embeddings()
    if type(lm_head) is torch.nn.Linear:
        lm_head.__class__ = OutputLayer  # in place, because its weight may be the embeddings' too
    tokenizer = load_tokenizer(name)

    if not stop_tokens(model, tokenizer):
        raise ValueError(
            f"--model {name}: neither its config nor its tokenizer names an end-of-sequence token"
        )
    # A tokenizer with fewer tokens is common: embeddings are padded to a round number.
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"--model {name}: the tokenizer has {len(tokenizer)} tokens, "
            f"more than the model's {vocabulary}"
        )

    model.to(device)
    model.eval()
    freeze(model, freeze_blocks)
    if gradient_checkpointing:
        # transformers 5.23 renamed the method; both names take the same argument.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model, tokenizer


def check_weights(name, model, loading):
    """Raise ValueError unless the weights of a checkpoint are exactly those of the model.

    loading: the loading info of from_pretrained; what transformers ignores is not in it.  Weights
    that a checkpoint lacks would be random, except those that are tied to others.
    """
    missing = set(loading["missing_keys"]) - set(model.all_tied_weights_keys)
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    faults = (
        ("lack", missing, ""),
        ("hold", loading["unexpected_keys"], ", for which the model has no place"),
        ("hold", mismatched, ", of another shape than the model's"),
    )
    clauses = []
    for verb, keys, why in faults:
        if keys:
            others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            clauses.append(f"{verb} {min(keys)}{others}{why}")
    if clauses:
        raise ValueError(f"--model {name}: its weights {', and '.join(clauses)}")


def freeze(model, blocks):
    """Stop the gradient of the embeddings and of the first `blocks` blocks; 0: of nothing.

    An output layer that is tied to the embeddings is frozen with them.
    Returns the model.  Raises ValueError if it has fewer blocks.
    """
    all_blocks = transformer_blocks(model)
    if blocks > len(all_blocks):
        raise ValueError(f"--freeze-blocks {blocks}: the model has only {len(all_blocks)} blocks")
    if blocks == 0:
        return model
    model.get_input_embeddings().requires_grad_(False)
    for block in all_blocks[:blocks]:
        block.requires_grad_(False)
    return model


def transformer_blocks(model):
    """The blocks of the transformer: the longest ModuleList of the backbone."""
    modules = model.base_model.modules()
    module_lists = [module for module in modules if isinstance(module, torch.nn.ModuleList)]
    return max(module_lists, key=len, default=[])


def stop_tokens(model, tokenizer):
    """The ids that end a completion: those of the generation config and of the tokenizer.

    Returns a sorted tuple, empty if neither names one.
    """
    ids = {tokenizer.eos_token_id}
    from_config = getattr(model.generation_config, "eos_token_id", None)  # one id, several or None
    if isinstance(from_config, (list, tuple)):
        ids.update(from_config)
    else:
        ids.add(from_config)
    ids.discard(None)
    return tuple(sorted(ids))


def check_context(model, prompt_tokens, max_new_tokens):
    """Raise ValueError if the longest prompt and its completion exceed the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt ({prompt_tokens} tokens) plus --max-new-tokens {max_new_tokens} "
            f"does not fit into the model's context of {context} tokens"
        )


# ------------------------------------------------------------------------------------------ Scoring


class OutputLayer(torch.nn.Linear):
    """The output layer of a model: its logits are float32 also where the model computes in 16 bits.

    bfloat16 has steps of 1/8 between 16 and 32.  Rounded to these, likely tokens would tie in the
    search, and log pi of the search and of the update would differ by .006 nats instead of .003
    (standard deviation, tiny base).  With 32 or 64 bits this is torch.nn.Linear.
    Source: logits in float32 for both, MiniMax-M1 2025, arXiv 2506.13585.
    """

    def forward(self, hidden):
        """hidden (..., D) -> logits (..., V)."""
        if hidden.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(hidden)
        logits = Float32Product.apply(hidden.flatten(0, -2), self.weight)
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits.unflatten(0, hidden.shape[:-1])


class Float32Product(torch.autograd.Function):
    """a (m, D) and b (V, D) of 16 bits -> a b^T (m, V) in float32, without rounding the products.

    The gradients have 16 bits, like those of torch's product of 16 bits.
    """

    @staticmethod
    def forward(ctx, a, b):
        """Return a b^T; `ctx` keeps both for the backward pass."""
        ctx.save_for_backward(a, b)
        if a.is_cuda:
            return torch.mm(a, b.T, out_dtype=torch.float32)  # only CUDA has it
        return a.float() @ b.float().T

    @staticmethod
    def backward(ctx, gradient):
        """Gradient (m, V) of the product -> those of a (m, D) and b (V, D)."""
        a, b = ctx.saved_tensors
        gradient = gradient.to(a.dtype)
        for_a = gradient @ b if ctx.needs_input_grad[0] else None
        for_b = gradient.T @ a if ctx.needs_input_grad[1] else None  # None: it is frozen
        return for_a, for_b


def score(model, tokens, mask, max_logits=2**24):
    """Score the tokens of a batch under the model as it is now.

    tokens (B, T): padded on the right.
    mask (B, T-1): True where the token at t+1 counts.

    Returns
        log_prob (B, T-1): log pi of each token, float32, zero off the mask.
        entropy (B, T-1): of the distribution that each token came from, float32, zero off the mask.

    The output layer runs only where the mask is True, in chunks of at most max_logits logits.  If
    there are several, each is computed again in the backward pass, and its logits are not kept.
    """
    B, T = tokens.shape
    assert mask.shape == (B, T - 1)

    # The prefix before the token at t+1 ends at t, so the last token is never an input.
    # Padding is on the right and attention is causal, so no real token attends to padding.
    # Hence the attention mask is all ones.
    inputs = tokens[:, :-1]
    outputs = model.base_model(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False
    )
    hidden = outputs.last_hidden_state  # (B, T-1, D)
    rows = hidden[mask]  # (M, D), M the number of tokens that count
    targets = tokens[:, 1:][mask]  # (M,)

    lm_head = model.get_output_embeddings()
    V = lm_head.weight.shape[0]
    chunk_size = max(1, max_logits // V)
    row_chunks = rows.split(chunk_size)
    target_chunks = targets.split(chunk_size)
    recompute = len(row_chunks) > 1 and torch.is_grad_enabled()

    log_probs = []
    entropies = []
    for chunk_rows, chunk_targets in zip(row_chunks, target_chunks):
        if recompute:
            chunk_log_prob, chunk_entropy = checkpoint(
                score_chunk, lm_head, chunk_rows, chunk_targets, use_reentrant=False
            )
        else:
            chunk_log_prob, chunk_entropy = score_chunk(lm_head, chunk_rows, chunk_targets)
        log_probs.append(chunk_log_prob)
        entropies.append(chunk_entropy)

    # (M,) -> (B, T-1): each number back to its place
    zeros = torch.zeros(B, T - 1, device=tokens.device)
    log_prob = zeros.masked_scatter(mask, torch.cat(log_probs))
    entropy = zeros.masked_scatter(mask, torch.cat(entropies))
    return log_prob, entropy


def score_chunk(lm_head, hidden, targets):
    """log pi of the targets, and entropy: hidden (m, D), targets (m,) -> (m,), (m,), float32."""
    logits = lm_head(hidden).float()  # (m, V)
    # log Z = logsumexp_a logit(a)
    log_z = logits.logsumexp(dim=-1)  # (m,)
    # log pi(a) = logit(a) - log Z
    log_prob = logits.gather(1, targets[:, None]).squeeze(1) - log_z
    # H = -sum_a pi(a) log pi(a) = log Z - sum_a pi(a) logit(a)
    entropy = log_z - (torch.exp(logits - log_z[:, None]) * logits).sum(dim=-1)
    return log_prob, entropy


# ---------------------------------------------------------------- Leaf weights and the critic's fit


def normalise_weights(weight, problem):
    """Leaf weights (B,) that sum to one within each problem, so that every problem counts alike.

    weight (B,): pi/q of each leaf, or its count.  problem (B,): int64, the leaf's problem.
    The mean with these weights is the self-normalised estimate: consistent, no longer unbiased.
    """
    total = torch.bincount(problem, weight)  # (N,)
    return weight / total[problem]


def variance_sums(values, returns, weight):
    """The five sums that explained_variance needs, to be added up over ranks.

    values, returns, weight: tensors of one shape.  Returns a dict of Python floats.
    """
    w = weight.double()
    r = returns.double()
    residual = (returns - values).double()
    return {
        "weight": w.sum().item(),
        "return": (w * r).sum().item(),
        "return_squared": (w * r * r).sum().item(),
        "residual": (w * residual).sum().item(),
        "residual_squared": (w * residual * residual).sum().item(),
    }


def explained_variance(sums):
    """1 - Var(return - V)/Var(return), from `variance_sums`.

    1: V predicts every return, up to a constant.  0: no better than the mean return does.
    None where all returns are the same.
    """
    total = sums["weight"] or 1.0
    # Var(x) = E[x^2] - E[x]^2
    return_variance = sums["return_squared"] / total - (sums["return"] / total) ** 2
    residual_variance = sums["residual_squared"] / total - (sums["residual"] / total) ** 2
    if return_variance > 1e-12:
        return 1.0 - residual_variance / return_variance
    return None


# --------------------------------------------------------------------------------------- Advantages


def grpo_advantages(rewards, weight, problem):
    """The reward of each leaf, normalised within its problem.  All (B,).

    weight: leaf weights.  problem: int64, the leaf's problem.
    """
    r = rewards.double()
    w = weight.double()
    total = torch.bincount(problem, w)  # (N,)

    # mean = sum_i w_i r_i / sum_i w_i,  variance = sum_i w_i (r_i - mean)^2 / sum_i w_i
    mean = torch.bincount(problem, w * r) / total  # (N,)
    centred = r - mean[problem]  # (B,)
    variance = torch.bincount(problem, w * centred**2) / total  # (N,)

    # A_i = (r_i - mean) / (standard deviation + 1e-6)
    advantages = centred / (variance[problem].sqrt() + 1e-6)
    # Equal rewards teach nothing.  Rounding would leave an A of 1e-10, and Adam makes a full step
    # of however small a gradient.
    least = r.new_zeros(len(total)).scatter_reduce(0, problem, r, "amin", include_self=False)
    most = r.new_zeros(len(total)).scatter_reduce(0, problem, r, "amax", include_self=False)
    advantages = torch.where((most > least)[problem], advantages, 0.0)
    return advantages.to(rewards.dtype)


def em_advantages(targets, weight, problem, correct):
    """The M-step of EM policy search: maximise E_{pi*}[log pi_theta] over the right leaves found.

    targets (B,): t(r) = value.soft_target(r), exp(r/beta) shifted and scaled to [0, 1].
    weight (B,): leaf weights that sum to one within each problem.  problem (B,): int64.
    correct (B,): bool.  Returns advantages (B,).

    weight * A is the leaf's share of the sum of weight * t(r) over the right leaves, scaled by the
    best t(r) among them.  Two consequences:
    - A right completion counts alike however unlikely it is under pi.  The gradient is that of
      log E_pi[t(r)], while that of E_pi[r] would be as small as pi.
    - Only right completions teach.  A wrong one is not imitated for what its form has earned, even
      if it is the best of its problem.
    """
    t = torch.where(correct, targets, 0.0)  # (B,)
    # Z = sum_i w_i t(r_i)
    Z = torch.bincount(problem, weight * t)  # (N,)
    best = t.new_zeros(len(Z)).scatter_reduce(0, problem, t, "amax")  # (N,)
    # A = t(r)/Z, times the best target; the clamp makes 0/0 a 0
    return best[problem] * t / Z[problem].clamp(min=torch.finfo(t.dtype).tiny)


def optimal_value(rewards, beta1):
    """V*(x) of the reference policy, estimated from the rewards of n of its samples.

    rewards (..., n) -> (...).
    """
    best = rewards.amax(dim=-1, keepdim=True)
    # V*(x) = beta1 log( 1/n sum_i exp(r_i/beta1) ), with the best reward taken out of the sum.
    # Then V* of equal rewards is exactly that reward, and no step is made of its rounding.
    return best[..., 0] + beta1 * ((rewards - best) / beta1).exp().mean(dim=-1).log()


# ------------------------------------------------------------------------------------------- Losses


def ppo_loss(
    log_prob, old_log_prob, advantages, entropy, token_weights, clip=0.2, entropy_coef=0.0
):
    """PPO-clip with an entropy bonus; also the loss of grpo and em, whose advantages differ.

    All tensors (B, T-1); token_weights are zero off the mask.  Returns (loss, metrics), both sums.
    """
    # ratio = pi_theta(a|s) / pi_old(a|s)
    ratio = (log_prob - old_log_prob).exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    # The gradient is 0 where A > 0 and ratio > 1 + eps, and where A < 0 and ratio < 1 - eps.
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    # Left out at 0: its backward pass would go over the whole vocabulary all the same.
    bonus = 0.0
    if entropy_coef:
        bonus = entropy_coef * entropy
    # L = -sum w ( min( ratio A, clip(ratio, 1 - eps, 1 + eps) A ) + c H )
    loss = -((surrogate + bonus) * token_weights).sum()
    policy_loss = -(surrogate * token_weights).sum()  # without the bonus
    return loss, {"policy_loss": policy_loss.detach()}


@torch.no_grad()
def ratio_metrics(log_prob, old_log_prob, entropy, token_weights, clip=0.2):
    """How far the policy has moved since the rollouts, for any loss; arguments as in ppo_loss.

    Returns a dict of weighted sums.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    # KL(pi_old || pi_theta) = E[ ratio - 1 - log ratio ], never negative (Schulman 2020, "k3")
    kl = ratio - 1 - log_ratio
    clipped = (ratio - 1).abs() > clip
    return {
        "approx_kl": (kl * token_weights).sum(),
        "clip_fraction": (clipped * token_weights).sum(),
        "entropy": (entropy * token_weights).sum(),
    }


def apo_loss(log_prob, ref_log_prob, mask, rewards, optimal_values, beta2, leaf_weights):
    """Optimal-advantage regression: fit beta2 log(pi_theta/pi_ref)(y) to r(y) - V*(x).

    log_prob, ref_log_prob, mask (B, T-1); rewards, optimal_values = V*(x), leaf_weights (B,).
    Returns (loss, metrics), both sums.

    r - V* is the advantage under the optimal policy pi*, which is proportional to
    pi_ref exp(r/beta1).  If beta1 = beta2 and V* is exact, then the two sides are equal for every
    completion y at pi_theta = pi*.  So pi* has loss zero whatever completions are fitted.
    """
    # log(pi_theta/pi_ref)(y) = sum_t ( log pi_theta(y_t) - log pi_ref(y_t) )
    log_ratio = ((log_prob - ref_log_prob) * mask).sum(dim=1)  # (B,)
    # L = sum w ( beta2 log(pi_theta/pi_ref)(y) + V*(x) - r )^2
    residual = beta2 * log_ratio + optimal_values - rewards
    loss = (residual**2 * leaf_weights).sum()
    return loss, {"policy_loss": loss.detach()}


# --------------------------------------------------------------------------------------------- Demo


def demo_score():
    """score() in chunks against the full (B, T, V) computation."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    model = Qwen2ForCausalLM(config)
    tokens = torch.randint(40, (3, 9))
    mask = torch.arange(8).expand(3, 8) >= 3  # a prompt of four tokens
    log_prob, entropy = score(model, tokens, mask, max_logits=80)  # two tokens a chunk

    full = F.log_softmax(model(tokens).logits[:, :-1], dim=-1)  # (B, T-1, V)
    full_log_prob = full.gather(2, tokens[:, 1:, None]).squeeze(2) * mask
    full_entropy = -(full.exp() * full).sum(-1) * mask
    error = max((log_prob - full_log_prob).abs().max(), (entropy - full_entropy).abs().max())
    print(
        "log pi and entropy in chunks against the full (B, T, V) computation: "
        f"off by at most {error:.1e}"
    )
    assert error < 1e-5


def demo_ppo():
    """One token of ratio 1.5.  With A = +1 the clip at 1.2 holds and the gradient is zero."""
    one = torch.ones(1, 1)
    for advantage, expected_loss, expected_gradient in ((1.0, -1.2, 0.0), (-1.0, 1.5, 1.5)):
        log_prob = torch.tensor([[1.5]]).log().requires_grad_()
        loss, _ = ppo_loss(
            log_prob=log_prob,
            old_log_prob=torch.zeros(1, 1),
            advantages=advantage * one,
            entropy=torch.zeros(1, 1),
            token_weights=one,
        )
        loss.backward()
        gradient = log_prob.grad.item()
        print(f"ratio 1.5, A = {advantage:+.0f}: loss {loss.item():+.2f}, gradient {gradient:+.2f}")
        assert abs(loss.item() - expected_loss) < 1e-6
        assert abs(gradient - expected_gradient) < 1e-6


def demo_apo():
    """Two completions, beta = 1: at pi*, proportional to pi exp(r), the apo loss is zero."""
    pi = torch.tensor([0.8, 0.2])
    rewards = torch.tensor([-1.0, 1.0])
    optimal = torch.softmax(pi.log() + rewards, dim=0)
    V = torch.logsumexp(pi.log() + rewards, dim=0)
    loss, _ = apo_loss(
        log_prob=optimal.log()[:, None],
        ref_log_prob=pi.log()[:, None],
        mask=torch.ones(2, 1),
        rewards=rewards,
        optimal_values=V.expand(2),
        beta2=1.0,
        leaf_weights=torch.full((2,), 0.5),
    )
    rounded = [round(p, 3) for p in optimal.tolist()]
    print(f"apo at the optimal policy {rounded}: loss {loss:.1e}")
    assert loss < 1e-10


def main():
    """Run the demos."""
    demo_score()
    demo_ppo()
    demo_apo()


if __name__ == "__main__":
    main()
