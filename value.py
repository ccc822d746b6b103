"""value.py -- the value head, the soft value that guides the search, returns, GAE, and the loss of the head.

One small network on the language model's last hidden state has two outputs, for two expectations over pi, the policy:

    V(s) = E_pi[ r | s ]                                                          the critic: baseline of GAE
    u(s) = E_pi[ (exp(r/beta) - exp(r_lo/beta)) / (exp(r_hi/beta) - exp(r_lo/beta)) | s ]   in (0, 1): guide of the search

Both are means of something seen at the end of a rollout, so both are fitted by MSE on Monte-Carlo returns.  From u the
soft value of KL-regularised RL, V*(s) = beta log E_pi[exp(r/beta) | s], follows exactly, for any reward in [r_lo, r_hi]:

    h(s) = V*(s) / beta = log( u exp(r_hi/beta) + (1 - u) exp(r_lo/beta) )              in nats, as log pi is

A departure from the usual value head: h cannot be had from V.  log E exp(r/beta) is not a function of E r, except for
a reward with two values; otherwise the form above with u = (V - r_lo)/(r_hi - r_lo) is an upper bound (convexity of
exp), and a loose one.  A *learned* h is neither exact nor admissible: the search it guides is a heuristic search.

Grid: index t of values, advantages, returns and mask (B, T-1) is about the token at t+1 of tokens (B, T).

    python value.py        # h against its definition, GAE worked by hand
"""

import torch
from torch import nn
from torch.nn import functional as F


class ValueHead(nn.Module):
    """hidden (..., D) -> V (...), u_logit (...).  Two layers; the last starts at zero, hence V = 0 and u = 1/2 at
    every prefix: before its first update the head prefers nothing.

    The hidden states are detached: the head reads the policy's mind and does not change it.  So the policy's gradient
    is the policy loss alone, and the head has a learning rate of its own (train.py).
    """

    def __init__(self, hidden_size, width=None):
        super().__init__()
        self.inner = nn.Linear(hidden_size, width or hidden_size)
        self.outer = nn.Linear(width or hidden_size, 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden):
        """hidden (..., D) of any float type -> V (...), u_logit (...), in the head's own type."""
        x = hidden.detach().to(self.inner.weight.dtype)
        out = self.outer(F.gelu(self.inner(x)))  # (..., D) -> (..., 2)
        return out[..., 0].clone(), out[..., 1].clone()  # no views: FSDP puts hooks on what a module returns


def soft_value(u_logit, r_lo, r_hi, beta):
    """h(s) in nats from the logit of u (any shape).  Lies in [r_lo/beta, r_hi/beta]."""
    # h = log( u exp(r_hi/beta) + (1 - u) exp(r_lo/beta) ), as a logaddexp so that a small beta does not overflow
    return torch.logaddexp(F.logsigmoid(u_logit) + r_hi / beta, F.logsigmoid(-u_logit) + r_lo / beta)


def soft_target(rewards, r_lo, r_hi, beta):
    """What u is regressed on: (exp(r/beta) - exp(r_lo/beta)) / (exp(r_hi/beta) - exp(r_lo/beta)), any shape, in [0, 1].

    In float32 it underflows to 0 where (r_hi - r)/beta exceeds about 100 nats: such a reward is then as bad as r_lo.
    """
    # the same, divided through by exp(r_hi/beta): nothing here overflows
    numerator = torch.exp((rewards - r_hi) / beta) * -torch.expm1(-(rewards - r_lo) / beta)
    return numerator / -torch.expm1(torch.as_tensor(-(r_hi - r_lo) / beta, dtype=rewards.dtype))


def monte_carlo_returns(rewards, mask):
    """rewards (B,) paid at the end, mask (B, T-1) -> returns (B, T-1).  gamma = 1: each token returns the reward."""
    return rewards[:, None] * mask


def gae(rewards, values, mask, lam):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) with gamma = 1.

    rewards (B,) paid with the last token; values (B, T-1), V of the prefix *before* the token of that index;
    mask (B, T-1), one run of ones a row.  Returns advantages (B, T-1), zero where the mask is.
    """
    B, L = values.shape
    assert rewards.shape == (B,) and mask.shape == (B, L)
    mask = mask.to(values.dtype)
    following = torch.cat([mask[:, 1:], mask.new_zeros(B, 1)], dim=1)  # is there a token after this one?
    next_values = torch.cat([values[:, 1:], values.new_zeros(B, 1)], dim=1) * following
    # delta_t = r_t + V(s_{t+1}) - V(s_t);  r_t = 0 but at the last token, where V(s_{t+1}) = 0
    delta = rewards[:, None] * (1 - following) + next_values - values
    advantages = torch.zeros_like(values)
    running = values.new_zeros(B)
    for t in reversed(range(L)):
        # A_t = delta_t + lambda A_{t+1}
        running = (delta[:, t] + lam * running * following[:, t]) * mask[:, t]
        advantages[:, t] = running
    return advantages


def value_loss(values, u_logit, returns, targets, token_weights):
    """Both MSEs of the head, each token weighted.

    values, u_logit, returns, targets, token_weights: (B, T-1).  The weights are leaf weights pi/q times the mask, over
    a normaliser that the caller counted over the whole batch (so micro-batches and ranks add up).  Leaves of a search
    over-represent what the search likes: unweighted, V would be the mean of the leaves instead of E_pi[r].
    Returns (loss, metrics), metrics as sums to be added up over micro-batches.
    """
    v_loss = ((values - returns) ** 2 * token_weights).sum()  # (V(s) - r)^2
    u_loss = ((torch.sigmoid(u_logit) - targets) ** 2 * token_weights).sum()  # (u(s) - target(r))^2
    return v_loss + u_loss, {"value_loss": v_loss.detach(), "soft_value_loss": u_loss.detach()}


def main():
    r_lo, r_hi, beta = -1.0, 1.1, 0.2
    rewards = torch.tensor([-1.0, -0.9, 1.1], dtype=torch.float64)  # nothing to parse, wrong but well-formed, right
    chances = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    V = (chances * rewards).sum()
    u = (chances * soft_target(rewards, r_lo, r_hi, beta)).sum()
    h = soft_value(torch.logit(u), r_lo, r_hi, beta)
    exact = torch.logsumexp(chances.log() + rewards / beta, dim=0)
    from_v = soft_value(torch.logit((V - r_lo) / (r_hi - r_lo)), r_lo, r_hi, beta)
    print(f"V = {V:.4f}   u = {u:.4f}   h = {h:.4f} nats   log E exp(r/beta) = {exact:.4f}   from V alone: {from_v:.4f}")
    assert abs(h - exact) < 1e-9 and from_v > h

    # By hand: delta = (.5 - .2, .1 - .5, 1 - .1) = (.3, -.4, .9);   A_3 = .9, A_2 = -.4 + .45 = .05, A_1 = .3 + .025 = .325
    values, mask = torch.tensor([[0.2, 0.5, 0.1]]), torch.ones(1, 3)
    advantages = gae(torch.tensor([1.0]), values, mask, lam=0.5)
    print("GAE(lambda = .5) of V = (.2, .5, .1) and r = 1:", [round(x, 4) for x in advantages[0].tolist()])
    assert torch.allclose(advantages, torch.tensor([[0.325, 0.05, 0.9]]))
    assert torch.allclose(gae(torch.tensor([1.0]), values, mask, lam=1.0), 1 - values)  # lambda = 1: return - V


if __name__ == "__main__":
    main()
