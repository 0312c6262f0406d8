"""Training: the split can't leak, the order of windows is a function of the position, a resumed run is the same run."""

import copy

import numpy as np
import pytest
import torch

from phase0_prototype import corpus, pretrain

transformers = pytest.importorskip("transformers")


def tiny_model():
    torch.manual_seed(0)
    shape = pretrain.SHAPE | {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def documents_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 64, n).astype(np.uint16) for n in lengths]


def test_the_split_depends_on_the_path_alone(tmp_path):
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    train = {d.path for d in corpus.documents(held_out=False, root=tmp_path)}
    held = {d.path for d in corpus.documents(held_out=True, root=tmp_path)}
    assert train | held == {f"m{i}.py" for i in range(200)}
    assert not train & held
    assert 2 <= len(held) <= 25
    for path in held:
        (tmp_path / path).write_text("changed = True\n")
    assert {d.path for d in corpus.documents(held_out=True, root=tmp_path)} == held


def test_a_directory_without_python_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python sources under"):
        list(corpus.documents(held_out=False, root=tmp_path))


def test_an_epoch_shows_every_window_once():
    windows = pretrain.Windows(documents_of([100, 60, 97]), seed=0)
    length, count = 16, (257 - 1) // 16
    inputs = [windows.batch(i * length, 1, length)[0][0].tolist() for i in range(count)]
    again = [windows.batch((count + i) * length, 1, length)[0][0].tolist() for i in range(count)]
    assert sum(map(len, inputs)) == count * length
    assert inputs != again  # the next epoch has another order


def test_targets_are_the_next_tokens():
    ids, targets = pretrain.Windows(documents_of([400]), seed=1).batch(0, 4, 32)
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_rows_of_a_batch_come_from_different_places():
    stream = [np.arange(6400, dtype=np.uint16)]
    ids, _ = pretrain.Windows(stream, seed=0).batch(0, 16, 64)
    starts = sorted(ids[:, 0].tolist())
    assert max(starts) - min(starts) > 3200


def test_the_rate_warms_up_stays_and_decays_to_nothing():
    recipe = pretrain.Recipe(tokens=1000 * 4096, warmup_steps=100, decay_fraction=0.3)
    assert recipe.steps == 1000
    assert recipe.rate(0) == pytest.approx(0.01)
    assert recipe.rate(400) == 1.0
    assert recipe.rate(850) == pytest.approx(0.5)
    assert recipe.rate(999) < 0.01
    assert not recipe.in_decay(699)
    assert recipe.in_decay(700)


def test_every_parameter_is_trained_by_exactly_one_optimizer():
    model = tiny_model()
    optimizers = pretrain.make_optimizers(model, pretrain.Recipe())
    trained = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(trained) == sorted({id(p) for p in model.parameters()})


def test_a_resumed_run_takes_the_same_step(tmp_path):
    recipe = pretrain.Recipe()
    windows = pretrain.Windows(documents_of([4000]), seed=0)
    model = tiny_model()
    optimizers = pretrain.make_optimizers(model, recipe)

    def step(model, optimizers, number):
        loss = pretrain.loss_function(model, *windows.batch(number * 128, 4, 32))
        pretrain.update(loss, model, optimizers, 1e-3)

    step(model, optimizers, 0)
    pretrain.save_state(tmp_path / "state.pt", model, optimizers, pretrain.Progress(1, 128))
    straight = copy.deepcopy(model.state_dict())
    step(model, optimizers, 1)
    resumed = tiny_model()
    resumed_optimizers = pretrain.make_optimizers(resumed, recipe)
    progress = pretrain.load_state(tmp_path / "state.pt", resumed, resumed_optimizers, "cpu")
    assert (progress.step, progress.seen) == (1, 128)
    assert all(torch.equal(straight[k], v) for k, v in resumed.state_dict().items())
    step(resumed, resumed_optimizers, 1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-6)
