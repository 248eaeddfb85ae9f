"""A client's policy: what it refuses whatever the server asks, and how a policy that cannot be used is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.client.node.policy import Policy
from fedveil.core.catalog import PROTECTIONS
from fedveil.core.errors import Disallowed, SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.keys import plain_keys


def asked(**settings) -> Experiment:
    return Experiment().override({key.replace("__", "."): value for key, value in settings.items()})


def sent(**settings: str) -> Experiment:
    """What a server sends, which may name code that nobody has."""
    return Experiment.received("".join(f"{key.replace('__', '.')} = {value!r}\n" for key, value in settings.items()))


def refusal(policy: Policy, experiment: Experiment) -> str:
    with pytest.raises(Disallowed, match=r"^this client's policy refuses the run: ") as refused:
        policy.check(experiment)
    assert set(refused.value.keys) <= set(plain_keys(Experiment)) | {"privacy.protection.min_clients"}
    return str(refused.value)


@pytest.mark.parametrize("name", [*PROTECTIONS])
def test_a_policy_that_says_nothing_refuses_nothing(tmp_path, name) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("protections = []\nmodels = []\n")
    for policy in (Policy(), Policy.read(path)):
        policy.check(asked(privacy__protection=name, training__epochs=1000, federation__rounds=10**6))


@pytest.mark.parametrize("name", [*PROTECTIONS])
def test_protections_that_are_not_named_are_refused(name) -> None:
    experiment = asked(privacy__protection=name)
    Policy(protections=(name,)).check(experiment)
    others = [other for other in PROTECTIONS if other != name]
    said = refusal(Policy(protections=others), experiment)
    assert f"privacy.protection = '{name}', and it allows {', '.join(others)}" in said


def test_models_that_are_not_named_are_refused() -> None:
    experiment = asked(model__name="mlp")
    Policy(models=("lstm", "mlp")).check(experiment)
    assert "model.name = 'mlp', and it allows lstm, bag" in refusal(Policy(models=("lstm", "bag")), experiment)


@pytest.mark.parametrize("models", [(), ("lstm", "mlp"), ("my_models:other",)])
def test_code_that_the_owner_did_not_name_is_never_called(models) -> None:
    experiment = sent(model__name="my_models:wide")
    Policy(models=("my_models:wide",)).check(experiment)
    assert "model.name = 'my_models:wide' names code" in refusal(Policy(models=models), experiment)
    divided = sent(data__partition="my_data:divide")
    assert "data.partition = 'my_data:divide' names code" in refusal(Policy(models=models), divided)
    told = {"evaluation__metrics": ["my_metrics:top3"], "data__validation_fraction": 0.2}
    assert "evaluation.metrics names 'my_metrics:top3', which is code" in refusal(
        Policy(models=("my_models:wide", "mlp")), asked(**told, evaluation__federated=True)
    )
    Policy().check(asked(**told))  # clients that do not evaluate call none


@given(least=st.integers(1, 12), run=st.integers(3, 10), protection=st.sampled_from(["ckks", "bfv", "secagg"]))
def test_a_protected_run_is_refused_just_where_it_may_add_up_fewer_clients(least, run, protection) -> None:
    experiment = asked(privacy__protection=protection, privacy__protection__min_clients=run)
    policy = Policy(min_clients=least)
    if run >= least:
        policy.check(experiment)
    else:
        assert f"privacy.protection.min_clients = {run}, and it allows {least} or more" in refusal(policy, experiment)


def test_a_cohort_smaller_than_the_policy_asks_for_is_refused() -> None:
    assert "allows 5 or more" in refusal(Policy(min_clients=5), asked(privacy__protection="ckks", federation__cohort=4))


def test_an_unprotected_run_meets_no_least_number_of_clients() -> None:
    Policy(min_clients=1).check(asked())
    said = refusal(Policy(min_clients=2), asked())
    assert "privacy.protection = 'none'" in said
    assert "sees each update by itself" in said


@given(most=st.integers(1, 6), epochs=st.integers(1, 6), rounds=st.integers(1, 6))
def test_epochs_and_rounds_are_allowed_up_to_their_limit(most, epochs, rounds) -> None:
    experiment = asked(training__epochs=epochs, federation__rounds=rounds)
    for policy, number, key in (
        (Policy(max_epochs=most), epochs, "training.epochs"),
        (Policy(max_rounds=most), rounds, "federation.rounds"),
    ):
        if number <= most:
            policy.check(experiment)
        else:
            assert f"{key} = {number}, and it allows {most} at most" in refusal(policy, experiment)


def test_steps_are_compared_with_epochs_only_where_a_step_is_one() -> None:
    policy = Policy(max_epochs=3)
    policy.check(asked(training__steps=3, training__batch_size="full"))
    assert "training.steps = 4 of all examples" in refusal(
        policy, asked(training__steps=4, training__batch_size="full")
    )
    assert "training.epochs can be compared" in refusal(policy, asked(training__steps=1, training__batch_size=16))
    Policy(max_rounds=10).check(asked(training__steps=100))


@pytest.mark.parametrize("key", ["least_cohort", "least_difference"])
def test_an_owner_who_is_revealed_among_many_takes_part_in_no_unprotected_run(key) -> None:
    Policy(**{key: 1}).check(asked())
    assert f"it is revealed among 3 clients or more ({key})" in refusal(Policy(**{key: 3}), asked())
    Policy(**{key: 3}).check(asked(privacy__protection="secagg"))


def test_an_encrypted_sum_of_fewer_than_the_least_cohort_is_refused_by_its_settings() -> None:
    Policy(least_cohort=3).check(asked(privacy__protection="ckks", privacy__protection__min_clients=3))
    said = refusal(Policy(least_cohort=4), asked(privacy__protection="ckks", privacy__protection__min_clients=3))
    assert "min_clients = 3, and it is revealed among 4 clients or more (least_cohort)" in said


def test_epsilon_is_bounded_only_where_the_client_adds_noise_itself() -> None:
    noisy = {"privacy__clip": 1.0, "privacy__noise_multiplier": 2.0}
    Policy(max_epsilon=5.0).check(asked(**noisy))
    for settings in ({}, {**noisy, "privacy__noise_at": "server"}):
        assert "it asks for a finite epsilon of its own noise (max_epsilon)" in refusal(
            Policy(max_epsilon=5.0), asked(**settings)
        )


def test_a_share_of_noise_is_a_clients_own_and_noise_that_hides_examples_hides_no_client() -> None:
    noisy = {"privacy__clip": 1.0, "privacy__noise_multiplier": 2.0}
    shares = {"privacy__noise_at": "distributed", "privacy__protection": "secagg", "federation__cohort": 10}
    Policy(max_epsilon=5.0).check(asked(**noisy, **shares))
    said = refusal(Policy(max_epsilon=5.0, min_noise=0.5), asked(**noisy, privacy__unit="example"))
    assert "which hides single examples, and it asks for a finite epsilon" in said
    assert "and it asks for noise of its own (min_noise)" in said


def test_a_client_that_would_drop_out_by_its_data_takes_part_in_no_run_with_noise() -> None:
    noisy = {"privacy__clip": 1.0, "privacy__noise_multiplier": 2.0}
    Policy(leak_guard="warn").check(asked(**noisy))
    Policy(leak_guard="refuse").check(asked())
    assert "would depend on its data" in refusal(Policy(leak_guard="refuse"), asked(**noisy))


def test_an_owner_may_take_part_in_no_run_whose_clients_evaluate() -> None:
    evaluated = asked(evaluation__federated=True, data__validation_fraction=0.2)
    Policy().check(evaluated)
    Policy(evaluates=False).check(asked())
    assert "it evaluates no model (evaluates)" in refusal(Policy(evaluates=False), evaluated)


def test_training_that_repeats_is_for_owners_who_allow_it() -> None:
    Policy(reproducible="allow").check_training(repeats=True)
    for policy in (Policy(), Policy(reproducible="refuse")):
        policy.check_training(repeats=False)
        with pytest.raises(Disallowed, match="asks for training that repeats from the seed"):
            policy.check_training(repeats=True)


@given(least=st.floats(0.01, 5), multiplier=st.floats(0, 5))
def test_less_noise_than_the_policy_asks_for_is_refused(least, multiplier) -> None:
    experiment = asked(privacy__clip=1.0, privacy__noise_multiplier=multiplier)
    if multiplier >= least:
        Policy(min_noise=least).check(experiment)
    else:
        said = refusal(Policy(min_noise=least), experiment)
        assert f"privacy.noise_multiplier = {multiplier:g}, and it allows {least:g} or more (min_noise)" in said


def test_noise_that_the_server_promises_is_no_noise_of_the_clients_own() -> None:
    noisy = {"privacy__clip": 1.0, "privacy__noise_multiplier": 2.0, "privacy__noise_at": "server"}
    Policy(min_noise=0.0).check(asked(**noisy))
    said = refusal(Policy(min_noise=0.5), asked(**noisy))
    assert "privacy.noise_at = 'server', and it asks for noise of its own (min_noise)" in said


def test_a_defence_that_names_code_is_never_called() -> None:
    Policy().check(asked(privacy__defence="prune"))
    said = refusal(Policy(), sent(privacy__defence="my_defences:mine"))
    assert "privacy.defence = 'my_defences:mine' names code" in said


def test_all_that_is_not_allowed_is_said_at_once() -> None:
    policy = Policy(protections=("ckks",), models=("lstm",), min_clients=3, max_epochs=1, max_rounds=1, min_noise=1)
    said = refusal(policy, asked(training__epochs=2))
    keys = ("privacy.protection", "min_clients", "min_noise", "model.name", "federation.rounds", "training.epochs")
    assert all(key in said for key in keys)


def test_a_policy_is_read_as_it_is_written(tmp_path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        'protections = ["ckks", "secagg"]\nmin_clients = 5\nmax_epochs = 2\nmax_rounds = 100\nmin_noise = 1\n'
        'models = ["lstm", "my_models:wide"]\n'
    )
    assert Policy.read(path) == Policy(
        protections=("ckks", "secagg"),
        min_clients=5,
        max_epochs=2,
        max_rounds=100,
        min_noise=1.0,
        models=("lstm", "my_models:wide"),
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('protection = ["ckks"]', "protection: unknown key; did you mean 'protections'?\n  known: protections, models"),
        ("[policy]\nmin_clients = 5", "policy: unknown key"),
        ('protections = "ckks"', "protections = 'ckks': must be a list of names"),
        ("protections = [1]", "protections = 1: must be a name"),
        ('protections = ["chks"]', "protections: no protection is called 'chks'; did you mean 'ckks'?"),
        ('models = ["lsmt"]', "models: no model is called 'lsmt'; did you mean 'lstm'?"),
        ("min_clients = 0", "min_clients = 0: must be greater than or equal to 1"),
        ("min_clients = true", "min_clients = True: must be a whole number"),
        ("max_epochs = 1.5", "max_epochs = 1.5: must be a whole number"),
        ('max_rounds = "10"', "max_rounds = '10': must be a whole number"),
        ("min_noise = -1", "min_noise = -1: must be greater than or equal to 0"),
        ("min_noise = nan", "min_noise = nan: must be"),
        ("max_epsilon = 0", "max_epsilon = 0: must be greater than 0"),
        ("delta = 1.0", "delta = 1.0: must be less than 1"),
        ("evaluates = 1", "evaluates = 1: must be true or false"),
        ('reproducible = "yes"', "reproducible = 'yes': must be 'allow' or 'refuse'"),
        ('leak_guard = "on"', "leak_guard = 'on': must be 'off', 'warn' or 'refuse'"),
        ("least_cohort = 2\nleast_difference = 3", "least_cohort = 2: is below least_difference = 3"),
        (
            'protections = ["none"]\nleast_cohort = 2',
            "least_cohort = 2: needs a protection, and protections allows none alone",
        ),
        (
            'protections = ["none"]\nmin_clients = 2',
            "min_clients = 2: needs a protection, and protections allows none alone",
        ),
        ("evaluates = true\nmax_epsilon = 3.0", "evaluates = true: an evaluation has no noise, and max_epsilon = 3"),
        ("min_clients", "is not valid TOML"),
        (b"\xff", "is not valid TOML"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_with_its_file_and_key(tmp_path, content, said) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as refused:
        Policy.read(path)
    assert f"the policy {path}" in str(refused.value)
    assert said in str(refused.value)


def test_a_policy_that_is_not_there_is_refused(tmp_path) -> None:
    for path in (tmp_path / "policy.toml", tmp_path):
        with pytest.raises(SettingsError, match=f"cannot read the policy {path}: "):
            Policy.read(path)


def test_all_keys_that_cannot_be_used_are_said_at_once(tmp_path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("min_clients = 0\nmax_epoch = 1\n")
    with pytest.raises(SettingsError) as refused:
        Policy.read(path)
    assert "min_clients = 0" in str(refused.value)
    assert "did you mean 'max_epochs'" in str(refused.value)
