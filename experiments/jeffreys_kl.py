"""A loss of your own: `python train.py --plugin experiments/jeffreys_kl.py --loss jeffreys_kl`."""

from losses import LOSSES, Loss


class JeffreysKL(Loss):
    """KL(student || teacher) + KL(teacher || student): the top K exactly, the rest from draws."""

    def __init__(self, config):
        super().__init__(top=config.top_k, tail=config.num_samples)

    def value(self, s, t, b):
        terms = (s.exp() - t.exp()) * (s - t)
        sampled = terms[:, self.tail] / b[:, self.tail].exp()
        return terms[:, self.top].sum(-1) + sampled.mean(-1)


LOSSES["jeffreys_kl"] = JeffreysKL
