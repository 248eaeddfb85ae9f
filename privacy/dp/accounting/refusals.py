"""Settings of noise that are refused, each with the reason and the nearest that works: no noise would cover them."""

from __future__ import annotations

from fedveil.core.errors import SettingsError
from fedveil.core.settings.sections import Settings


def refuse_uncovered(e: Settings) -> None:
    """Refuse what no noise covers."""
    privacy = e.privacy
    asked = (
        f"privacy.epsilon = {privacy.epsilon:g}"
        if privacy.epsilon is not None
        else f"privacy.noise_multiplier = {privacy.noise_multiplier:g}"
    )
    what = "an example's gradient" if privacy.unit == "example" else "an update"
    _refuse(
        privacy.clip is None,
        f"{asked}: noise hides {what} only up to its norm, which nothing bounds; set privacy.clip, 1.0 say",
    )
    _refuse(
        privacy.delta * e.data.clients >= 1,
        f"privacy.delta = {privacy.delta:g}: must be smaller than 1 / data.clients = {1 / e.data.clients:g}; a larger one would "
        "allow showing all of one client's data",
    )
    _refuse(
        e.training.schedule == "plateau",
        f"training.schedule = 'plateau': follows the clients' training losses, which they do not tell with {asked}",
    )
    _refuse(
        e.evaluation.federated,
        f"evaluation.federated = true: clients' scores travel without noise, and {asked} would not cover what they tell; "
        "evaluate on the server",
    )
    _refuse(
        e.federation.quorum is not None and e.federation.sampling == "poisson",
        f"federation.quorum = {e.federation.quorum}: how many clients coins choose depends on how many there are, and a round that "
        f"is left out for it tells of that, which {asked} does not cover; use federation.sampling = 'order', or leave federation.quorum out",
    )
    _refuse(
        privacy.leak_guard == "refuse",
        f"privacy.leak_guard = 'refuse': whether a client drops out would depend on its data, which {asked} does not cover; use "
        "privacy.leak_guard = 'warn', which tells its operator alone",
    )
    if e.data.dataset.resolved and "vocabulary" in e.data.dataset.declaration.uses and e.data.dataset.name != "own":
        refuse_own_words(e)
    _refuse(
        e.communication.encoding == "int8"
        and (e.federation.cohort < e.data.clients or e.federation.sampling == "poisson"),
        "communication.encoding = 'int8': carries what it lost to a client's next update, so that updates of one client in "
        f"several rounds depend on each other in a way that {asked} is not proven for where clients are sampled; use float16",
    )
    _refuse(
        privacy.clip == "adaptive" and (privacy.unit == "example" or privacy.noise_at != "server" or privacy.protected),
        "privacy.clip = 'adaptive': the server finds the bound from a count of the updates that are shorter, to which it adds "
        "noise; it works with privacy.unit = 'client', privacy.noise_at = 'server', privacy.protection = 'none'; else give a number",
    )
    _refuse(
        privacy.noise == "banded"
        and not (privacy.unit == "client" and privacy.noise_at == "server" and e.federation.sampling == "order"),
        "privacy.noise = 'banded': takes back noise of earlier rounds, which is proven where a client takes part at known "
        "distances; use it with federation.sampling = 'order', privacy.noise_at = 'server' and privacy.unit = 'client'",
    )
    _refuse(
        privacy.noise == "banded" and 2 * e.federation.cohort > e.data.clients,
        f"privacy.noise = 'banded': a client would take part in every other round at least (federation.cohort = "
        f"{e.federation.cohort}, data.clients = {e.data.clients}), and there is nothing to take back; use 'independent'",
    )
    _refuse(
        privacy.noise_at == "server" and privacy.shows == "sum",
        f"privacy.noise_at = 'server': the server of privacy.protection = '{privacy.protection}' only adds up ciphertexts that it "
        "cannot read; use privacy.noise_at = 'distributed' (bfv) or 'client', whose noise adds up under encryption",
    )
    _refuse(
        e.federation.sampling == "poisson" and privacy.shows == "sum",
        f"federation.sampling = 'poisson': a sum of updates is divided by the average cohort, and the server of "
        f"privacy.protection = '{privacy.protection}' cannot divide what it cannot read; use secagg, or federation.sampling = 'order'",
    )


def refuse_own_words(e: Settings) -> None:
    """Refuse words of texts that the texts themselves gave; a user's own data may be no texts, which their file shows."""
    _refuse(
        e.privacy.noisy and e.data.vocabulary == "train",
        "data.vocabulary = 'train': is made of the clients' own words, and noise does not cover it; use data.vocabulary = "
        "'hashed', or a public list of words in a file",
    )


def refuse_for_shares(e: Settings) -> None:
    """Refuse shares of noise that nothing adds up, or that are not accounted."""
    _refuse(
        e.privacy.protection.name in ("none", "ckks"),
        f"privacy.noise_at = 'distributed': a client's share of the noise hides nothing by itself, and privacy.protection = "
        f"'{e.privacy.protection}' "
        + ("shows each update" if e.privacy.protection.name == "none" else "adds noise of its own to whole numbers")
        + "; use secagg or bfv, or privacy.noise_at = 'client'",
    )
    _refuse(
        e.privacy.distribution == "skellam" and (e.federation.sampling == "poisson" or e.privacy.unit == "example"),
        "privacy.distribution = 'skellam': is accounted for clients' sums without sampling by coins; use 'gaussian'",
    )


def _refuse_what_is_no_sum(e: Settings) -> None:
    """Refuse what makes something else than one sum of gradients of a client's update, so that an example may change more."""
    privacy, training = e.privacy, e.training
    _refuse(
        training.steps != 1,
        f"privacy.unit = 'example', privacy.noise_at = '{privacy.noise_at}': noise in the sum hides gradients of one step, and "
        "clients take several; set training.steps = 1, or privacy.noise_at = 'client', whose noise is in every step",
    )
    _refuse(
        training.optimizer != "sgd",
        f"training.optimizer = '{training.optimizer}': noise in the sum hides gradients, and {training.optimizer} divides by their "
        "size, which it does not hide; use training.optimizer = 'sgd', or an optimiser of the server (federation.strategy = 'fedadam')",
    )
    _refuse(
        training.nesterov,
        "training.nesterov = true: counts a step's gradient more than once, and noise in the sum hides it once; use training.nesterov "
        "= false, or momentum of the server (federation.strategy = 'fedavgm')",
    )
    _refuse(
        privacy.defence.name != "none",
        f"privacy.defence = '{privacy.defence}': changes a client's sum of gradients by what is in it, so that one example may change "
        "all of it, which noise in the sum does not hide; use privacy.defence = 'none', or privacy.noise_at = 'client'",
    )
    _refuse(
        e.communication.encoding != "float32",
        f"communication.encoding = '{e.communication.encoding}': rounds each client's sum of gradients by more than an example may "
        "change it, which noise in the sum does not hide; use communication.encoding = 'float32', or privacy.noise_at = 'client'",
    )
    if privacy.noise_at == "distributed":
        refuse_for_shares(e)
        _refuse(
            training.schedule != "constant",
            f"training.schedule = '{training.schedule}': shares of the noise are made for one learning rate; use 'constant', or "
            "privacy.noise_at = 'server'",
        )
    _refuse(
        privacy.protected and training.schedule != "constant",
        f"training.schedule = '{training.schedule}': with privacy.protection = '{privacy.protection}' updates are rounded to multiples of "
        "one number, which counts for more where the learning rate is lower; use 'constant', or privacy.protection = 'none'",
    )


def refuse_for_examples(e: Settings) -> None:
    """Refuse a second bound of gradients."""
    _refuse(
        e.training.max_grad_norm is not None,
        f"training.max_grad_norm = {e.training.max_grad_norm}: with privacy.unit = 'example' each example's gradient is "
        "clipped to privacy.clip; give that alone",
    )


def refuse_for_examples_in_sums(e: Settings) -> None:
    """Refuse sums of what is no gradient of one step."""
    refuse_for_examples(e)
    _refuse_what_is_no_sum(e)


def nothing_more(_e: Settings) -> None:
    """Refuse nothing more."""


def _refuse(when: bool, message: str) -> None:
    if when:
        raise SettingsError(message)
