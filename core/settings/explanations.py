"""Validation errors in a user's words: what was given, what is allowed, and the nearest name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from fedveil.core.errors import closest, plainly

LONGEST = 300  # characters of a refused value that are shown
SAID = "said"  # the type of an error whose message is shown as it is

# pydantic's error types, and what the user should have given
WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "1 to 80 letters, digits, '.', '_' or '-'",
    "model_type": "a section, as in [data]",
    "string_too_long": "text of at most {max_length} characters",
    "tuple_type": "a list, as in [64, 32]",
    "too_long": "a list of at most {max_length}",
}


# settings by what other frameworks, papers and people call them (Flower, pfl-research, FedML, NVFlare, FedScale, TFF, LEAF)
CALLED = {
    "communication.encoding": "compression compress quantization quantize precision",
    "data.clients": "num_clients n_clients nb_clients clients_num total_clients client_num_in_total num_users n_users users "
    "num_parties n_parties parties num_supernodes supernodes num_partitions num_nodes population population_size num_devices",
    "data.dataset": "dataset_name data_name data_set task benchmark",
    "data.labels": "classes class_names label_names target_names",
    "data.max_tokens": "max_length max_len maxlen seq_len seq_length sequence_length max_seq_len max_seq_length",
    "data.partition": "partitioner partition_method partition_type partition_name partitioning split_method non_iid noniid iid "
    "niid heterogeneity",
    "data.partition.alpha": "dirichlet_alpha dir_alpha partition_alpha concentration dirichlet",
    "data.partition.classes": "classes_per_client num_classes_per_client labels_per_client num_classes",
    "data.partition.shards": "shards_per_client num_shards",
    "data.path": "data_path data_dir datadir data_file file csv root train_path data_root",
    "data.test_fraction": "test_split test_size test_ratio",
    "data.validation_fraction": "val_fraction val_ratio val_split validation_split valid_fraction local_test_fraction",
    "data.vocabulary_size": "vocab_size max_vocab num_words",
    "device": "gpu cuda use_gpu use_cuda accelerator",
    "engine": "backend executor simulator",
    "evaluation.cohort": "fraction_evaluate fraction_eval min_evaluate_clients min_evaluate_nodes",
    "evaluation.every": "eval_every test_every eval_interval test_interval eval_freq evaluation_frequency eval_gap "
    "frequency_of_the_test evaluate_every",
    "evaluation.federated": "federated_evaluation client_evaluation local_evaluation",
    "federation.byzantine_clients": "num_malicious_nodes num_malicious_clients num_byzantine attackers num_attackers",
    "federation.cohort": "fraction clients_per_round num_clients_per_round client_num_per_round num_clients_per_iteration cohort_size "
    "sample_size num_participants num_sampled_clients num_selected clients_per_iteration users_per_round workers_per_round "
    "fraction_fit fraction_train client_fraction fraction_clients frac participation participation_rate participation_ratio "
    "sampling_rate sample_rate sampling_ratio sample_ratio join_ratio",
    "federation.deadline": "timeout round_timeout time_limit",
    "federation.patience": "early_stopping early_stop",
    "federation.quorum": "min_clients min_available_clients min_available_nodes min_fit_clients min_train_nodes min_completion_rate",
    "federation.rounds": "num_rounds n_rounds num_server_rounds server_rounds comm_round comm_rounds communication_rounds "
    "num_communication_rounds global_rounds num_global_rounds total_rounds max_rounds global_epochs central_num_iterations "
    "num_central_iterations num_iterations",
    "federation.strategy": "aggregation aggregator aggregation_method algorithm alg algo fl_algorithm federated_optimizer "
    "strategy_name method workflow server_optimizer",
    "federation.strategy.fraction": "trim_ratio trim_fraction",
    "federation.strategy.learning_rate": "server_lr server_learning_rate global_lr eta_g slr",
    "federation.strategy.momentum": "server_momentum",
    "federation.strategy.selected": "num_nodes_to_select num_clients_to_keep",
    "federation.target_accuracy": "target_acc",
    "model.dropout": "dropout_rate drop_prob",
    "model.embedding": "embedding_dim embedding_size embed_dim",
    "model.hidden": "hidden_size hidden_sizes hidden_dim hidden_units hidden_layers",
    "model.name": "model network net arch architecture backbone model_name model_type",
    "name": "run_name exp_name experiment_name",
    "privacy.clip": "clipping clip_norm clipping_norm max_norm l2_norm_clip clipping_bound clipping_threshold clip_threshold",
    "privacy.noise_multiplier": "noise sigma noise_scale noise_std noise_level dp_sigma",
    "privacy.epsilon": "eps target_epsilon privacy_budget epsilon_budget dp_epsilon",
    "federation.sampling": "client_sampling sampler user_sampling poisson_sampling",
    "privacy.protection": "encryption encrypt secagg secure_aggregation secure_agg he homomorphic_encryption masking dp",
    "seed": "random_seed random_state manual_seed rng",
    "training.batch_size": "batch bs batchsize local_bs local_batch_size train_batch_size minibatch_size mini_batch_size",
    "training.epochs": "local_epochs num_local_epochs local_epoch local_ep num_epochs n_epochs client_epochs epochs_per_round "
    "client_epochs_per_round local_num_epochs",
    "training.learning_rate": "lr eta client_lr local_lr local_learning_rate client_learning_rate learningrate step_size",
    "training.loss": "criterion loss_fn loss_function objective",
    "training.max_grad_norm": "grad_clip gradient_clip gradient_clipping clip_grad clip_grad_norm grad_norm clip_gradients",
    "training.optimizer": "optimiser optim client_optimizer local_optimizer opt",
    "training.proximal_mu": "mu fedprox_mu prox_mu proximal_term prox lambda",
    "training.schedule": "scheduler lr_scheduler lr_schedule lr_decay",
    "training.steps": "local_steps num_steps max_steps local_iterations local_updates iterations local_num_steps",
    "training.weight_decay": "wd l2 weightdecay l2_regularization",
    "workers": "num_workers n_jobs num_processes processes num_cpus threads",
}  # fmt: skip
MEANING = {name: key for key, names in CALLED.items() for name in names.split()}
SHARE = re.compile("fraction|frac|rate|ratio|participation$")
MOST = 3  # keys that are offered for one name


def explain(
    error: ValidationError,
    known: Iterable[str],
    choices: Iterable[str],
    prefix: str = "",
    offered: Callable[[], Iterable[str]] = tuple,
) -> str:
    """Return one line for each refused key: what was given, and what is allowed.

    known: all dotted keys but those of parts; choices: the prefixes of the keys of parts' settings
    prefix: is put before all keys
    offered: the keys, those of parts too, of which an unknown key is told the nearest; asked for only then
    """
    known, choices = list(known), list(choices)
    lines: dict[str, tuple[str, list[str]]] = {}
    for problem in error.errors():
        path = [prefix] * bool(prefix) + [str(part) for part in problem["loc"]]
        key = _key(path, known, choices)
        if problem["type"] == SAID:
            lines[key] = (problem["msg"], [])
        elif problem["type"] == "extra_forbidden":
            given = _leaves(key, problem["input"])
            lines |= {leaf: (f"{leaf}: unknown setting{meant(leaf, offered())}", []) for leaf in given}
        elif problem["type"] == "missing":
            lines[key] = (f"{key}: must be given", [])
        elif problem["type"] == "value_error":
            lines[key] = (f"{key} = {_shown(problem['input'])}: {problem['ctx']['error']}", [])
        else:
            allowed = problem["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
            if abs(end := problem.get("ctx", {}).get("le", 0)) > 1e16:  # its digits say nothing
                allowed = f"less than or equal to {end:g}"
            if problem["type"] in WORDS:
                allowed = WORDS[problem["type"]].format(**problem.get("ctx", {}))
            lines.setdefault(key, (f"{key} = {_shown(problem['input'])}: must be ", []))[1].append(allowed)
    return "\n".join(start + ", or ".join(dict.fromkeys(allowed)) for start, allowed in lines.values())


def _shown(value: object) -> str:
    """Return a refused value as Python writes it, cut where it is long: another machine may have sent it."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _key(path: list[str], known: list[str], choices: list[str]) -> str:
    """Return the key of the refused setting, without the type names that pydantic may append to its path."""
    for end in range(1, len(path) + 1):
        key = ".".join(path[:end])
        if key in choices:
            return ".".join(path[: end + 1])
        if key in known:
            return key
    return ".".join(path)


def _leaves(key: str, value: Any) -> list[str]:
    """Return the keys of the settings in an unknown section, or the key of a setting itself."""
    if not isinstance(value, Mapping) or not value:
        return [key]
    return [leaf for name, each in value.items() for leaf in _leaves(f"{key}.{name}", each)]


def meant(key: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the settings that an unknown dotted key may mean, or else what its section has.

    Its last word counts first: keys that end in it, what other frameworks call so, and keys whose last word is close;
    of a word without a section, the whole key. Of several the ones in the same section come first.
    """
    keys, section = list(known), key.rpartition(".")[0]
    word = plainly(key.rpartition(".")[2])
    found = [each for each in keys if each.rpartition(".")[2] == word or each == MEANING.get(word)]
    if not found:
        close = closest(word, (each.rpartition(".")[2] for each in keys), cutoff=0.75)
        found = [each for each in keys if each.rpartition(".")[2] == close]
    if not found and not section:  # a key without its dot
        found = [each for each in [closest(key, keys, cutoff=0.8)] if each]
    found.sort(key=lambda each: (each.rpartition(".")[0] != section, each.count(".")))
    if found:
        share = " (a number of clients, no share of them)" if SHARE.search(word) else ""
        offers = [f"'{each}'{share if each.endswith('.cohort') else ''}" for each in found[:MOST]]
        return f"; did you mean {' or '.join(offers)}?"
    sections = dict.fromkeys(each.partition(".")[0] for each in keys if "." in each)
    near = closest(section or key, sections, cutoff=0.7)
    has = [each.removeprefix(f"{near}.") for each in keys if each.startswith(f"{near}.") and each.count(".") == 1]
    return f"; [{near}] has {', '.join(has)}" if near else f"; sections are {', '.join(sections)}" if sections else ""
