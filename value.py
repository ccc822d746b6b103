"""value.py -- the value head, the soft value that guides the search, returns, GAE, the head's loss.

The value head is a small network on the language model's last hidden state.  Its two outputs are
expectations over pi, the policy, of what a completion of the prefix s will be worth:

    V(s) = E_pi[ r | s ]             the critic: the baseline of GAE
    u(s) = E_pi[ target(r) | s ]     in (0, 1), the guide of the search, with
    target(r) = (exp(r/beta) - exp(r_lo/beta)) / (exp(r_hi/beta) - exp(r_lo/beta))

Both are means of a number that is known when the rollout ends, and are fitted to it by squared
error (Monte-Carlo returns).  They are these expectations only as far as the weighted leaves stand
for pi: by sampling, and by a search at tau > 0 with the weights pi/q.  At tau = 0 they are means
over what the search finds.  The soft value of KL-regularised RL,
V*(s) = beta log E_pi[exp(r/beta) | s], is a function of u, for any reward in [r_lo, r_hi].
In nats, the unit of log pi, it is

    h(s) = V*(s)/beta = log( u exp(r_hi/beta) + (1 - u) exp(r_lo/beta) )

Departure from the usual value head: two outputs instead of one.  h cannot be computed from V,
because the mean of exp(r/beta) is not a function of the mean of r.  Only for rewards with two
values is u = (V - r_lo)/(r_hi - r_lo).  For others the h of that u is a loose upper bound, as exp
is convex.  A *learned* h is neither exact nor admissible: the search it guides is a heuristic one.

Shapes: B rollouts, T tokens, D hidden.  Index t of values, advantages, returns and mask (B, T-1)
is about the token at t+1 of tokens (B, T).

    python value.py        # compares h with its definition, and GAE with numbers worked by hand
"""

import torch
from torch import nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------- The value head


class ValueHead(nn.Module):
    """Two linear layers with a GELU between them: hidden (..., D) -> V (...), u_logit (...).

    The last layer starts at zero: V = 0 and u = 1/2, so at first no prefix is preferred to another.
    The hidden states are detached: the head's loss trains the head alone and never the policy.
    width: of the inner layer, D by default.
    """

    def __init__(self, hidden_size, width=None):
        super().__init__()
        width = width or hidden_size
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden):
        """hidden (..., D) of any float type -> V (...), u_logit (...) in the head's own type."""
        x = hidden.detach().to(self.inner.weight.dtype)
        x = F.gelu(self.inner(x))  # (..., D) -> (..., width)
        x = self.outer(x)  # (..., width) -> (..., 2)
        # Copies instead of views, because FSDP puts hooks on the tensors that a module returns.
        V = x[..., 0].clone()
        u_logit = x[..., 1].clone()
        return V, u_logit


# ----------------------------------------------------------------------------------- The soft value


def soft_value(u_logit, r_lo, r_hi, beta):
    """h(s) in nats from the logit of u, any shape.  It lies in [r_lo/beta, r_hi/beta]."""
    # log( u exp(r_hi/beta) ) and log( (1 - u) exp(r_lo/beta) ); 1 - sigmoid(x) = sigmoid(-x)
    log_high = F.logsigmoid(u_logit) + r_hi / beta
    log_low = F.logsigmoid(-u_logit) + r_lo / beta
    # h = log( u exp(r_hi/beta) + (1 - u) exp(r_lo/beta) ); in logs, so that no exp overflows
    return torch.logaddexp(log_high, log_low)


def soft_target(rewards, r_lo, r_hi, beta):
    """What u is regressed on: exp(r/beta), mapped so that r_lo gives 0 and r_hi gives 1; any shape.

    In float32 it underflows to 0, the target of r_lo, where (r_hi - r)/beta exceeds about 100 nats.
    """
    # target = (exp(r/beta) - exp(r_lo/beta)) / (exp(r_hi/beta) - exp(r_lo/beta))
    #        = exp((r - r_hi)/beta) (1 - exp(-(r - r_lo)/beta)) / (1 - exp(-(r_hi - r_lo)/beta))
    # The second form, divided through by exp(r_hi/beta), does not overflow.
    numerator = torch.exp((rewards - r_hi) / beta) * -torch.expm1(-(rewards - r_lo) / beta)
    exponent = torch.as_tensor(-(r_hi - r_lo) / beta, dtype=rewards.dtype)
    return numerator / -torch.expm1(exponent)


# --------------------------------------------------------------------------- Returns and advantages


def monte_carlo_returns(rewards, mask):
    """gamma = 1, so each token's return is the reward: rewards (B,), mask (B, T-1) -> (B, T-1)."""
    return rewards[:, None] * mask


def gae(rewards, values, mask, lam):
    """Generalised advantage estimation, gamma = 1: Schulman et al. 2016, arXiv 1506.02438, eq. 16.

    rewards (B,): paid with the last token.
    values (B, T-1): V of the prefix *before* the token of that index.
    mask (B, T-1): one run of ones a row, the tokens of the completion.
    lam: lambda in [0, 1].  0 gives A = V(next prefix) - V, 1 gives A = return - V.
    Returns advantages (B, T-1), zero off the mask.
    """
    B, length = values.shape
    assert rewards.shape == (B,)
    assert mask.shape == (B, length)
    mask = mask.to(values.dtype)

    # has_next (B, T-1): 1 where another token of the completion follows, else 0
    has_next = torch.cat([mask[:, 1:], mask.new_zeros(B, 1)], dim=1)
    next_values = torch.cat([values[:, 1:], values.new_zeros(B, 1)], dim=1) * has_next

    # delta_t = r_t + V(s_{t+1}) - V(s_t).  At the last token V(s_{t+1}) = 0, before it r_t = 0.
    delta = rewards[:, None] * (1 - has_next) + next_values - values

    advantages = torch.zeros_like(values)
    running = values.new_zeros(B)
    for t in reversed(range(length)):
        # A_t = delta_t + lambda A_{t+1}
        running = (delta[:, t] + lam * running * has_next[:, t]) * mask[:, t]
        advantages[:, t] = running
    return advantages


# ----------------------------------------------------------------------------- The loss of the head


def value_loss(values, u_logit, returns, targets, token_weights):
    """The two squared errors of the head, summed over weighted tokens.  All arguments are (B, T-1).

    token_weights: leaf weight pi/q times mask, divided by a total counted over the whole batch, so
    that micro-batches and ranks add up.  Without pi/q V would be the mean of the leaves that the
    search returned, instead of E_pi[r].
    Returns (loss, metrics), all of them sums over the micro-batch.
    """
    # L = sum over tokens of w ( (V(s) - r)^2 + (u(s) - target(r))^2 )
    v_loss = ((values - returns) ** 2 * token_weights).sum()
    u_loss = ((torch.sigmoid(u_logit) - targets) ** 2 * token_weights).sum()
    metrics = {"value_loss": v_loss.detach(), "soft_value_loss": u_loss.detach()}
    return v_loss + u_loss, metrics


# --------------------------------------------------------------------------------------------- Demo


def demo_soft_value():
    """h from u equals log E exp(r/beta); h from V alone is too large."""
    r_lo = -1.0
    r_hi = 1.1
    beta = 0.2
    # no answer that can be parsed; wrong but well-formed; right
    rewards = torch.tensor([-1.0, -0.9, 1.1], dtype=torch.float64)
    probabilities = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)

    V = (probabilities * rewards).sum()
    u = (probabilities * soft_target(rewards, r_lo, r_hi, beta)).sum()
    h = soft_value(torch.logit(u), r_lo, r_hi, beta)
    exact = torch.logsumexp(probabilities.log() + rewards / beta, dim=0)
    u_from_V = (V - r_lo) / (r_hi - r_lo)
    h_from_V = soft_value(torch.logit(u_from_V), r_lo, r_hi, beta)

    print(
        f"V = {V:.4f}   u = {u:.4f}   h = {h:.4f} nats   "
        f"log E exp(r/beta) = {exact:.4f}   from V alone: {h_from_V:.4f}"
    )
    assert abs(h - exact) < 1e-9
    assert h_from_V > h


def demo_gae():
    """Three tokens by hand, lambda = 1/2; and lambda = 1, which is return - V."""
    rewards = torch.tensor([1.0])
    values = torch.tensor([[0.2, 0.5, 0.1]])
    mask = torch.ones(1, 3)

    # delta_1 = .5 - .2 = .3       A_1 = .3 + .5 * .05 = .325
    # delta_2 = .1 - .5 = -.4      A_2 = -.4 + .5 * .9 = .05
    # delta_3 = 1 - .1  = .9       A_3 = .9
    advantages = gae(rewards, values, mask, lam=0.5)
    rounded = [round(advantage, 4) for advantage in advantages[0].tolist()]
    print("GAE(lambda = .5) of V = (.2, .5, .1) and r = 1:", rounded)
    assert torch.allclose(advantages, torch.tensor([[0.325, 0.05, 0.9]]))
    assert torch.allclose(gae(rewards, values, mask, lam=1.0), 1 - values)


def main():
    """Run the demos."""
    demo_soft_value()
    demo_gae()


if __name__ == "__main__":
    main()
