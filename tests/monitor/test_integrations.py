"""The adapters: their methods called as trainers call them, and the real Trainer where it is."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from monitor.networks import ROWS, Weights
from onsphere.integrations import huggingface, lightning
from onsphere.monitor import Run, RunError


def weights():
    net = Weights(w=torch.eye(4, 3))
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def train(net, optimizer, count, after=lambda: None):
    for _ in range(count):
        net.w.grad = torch.ones(4, 3)
        optimizer.step()
        after()


def test_hugging_face_calls(tmp_path):
    net, optimizer = weights()
    callback = huggingface.Watch({"w": ROWS}, every=2, path=tmp_path / "run.jsonl")
    state = SimpleNamespace(global_step=4)
    callback.on_train_begin(None, state, None, model=net, optimizer=optimizer, lr_scheduler=None)
    train(net, optimizer, 3)
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs, model=net)
    assert logs["loss"] == 1.0
    assert "onsphere/rotation/w" in logs
    callback.on_train_end(None, state, None, model=net)
    assert Run.read(tmp_path / "run.jsonl").steps.tolist() == [4, 6]


@pytest.fixture
def fake_lightning(monkeypatch):
    """A Lightning that is there, and has nothing but its base class."""
    home, inner = ModuleType("lightning"), ModuleType("lightning.pytorch")
    inner.Callback = type("Callback", (), {"on_fit_end": lambda *_: "theirs"})
    monkeypatch.setitem(sys.modules, "lightning", home)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", inner)
    return inner


def test_lightning_calls(fake_lightning, tmp_path):
    net, optimizer = weights()
    path = tmp_path / "run.jsonl"
    callback = lightning.monitor_callback({"w": ROWS}, model=net, every=2, path=path)
    assert isinstance(callback, fake_lightning.Callback)
    assert callback.on_fit_end() == "theirs"
    logged = []
    module = SimpleNamespace(log_dict=logged.append)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    trainer = SimpleNamespace(optimizers=[optimizer, other], global_step=0)
    callback.on_train_start(trainer, module)
    train(net, optimizer, 5, lambda: callback.on_train_batch_end(trainer, module, None, None, 0))
    assert len(logged) == 3, "once per sample"
    assert "onsphere/norm/w" in logged[0]
    callback.on_exception(trainer, module, KeyboardInterrupt())
    assert Run.read(path).steps.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("module", "name"), [(huggingface, "transformers"), (lightning, "Lightning")]
)
def test_a_framework_that_is_missing_is_named(module, name, monkeypatch):
    for home in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, home, None)
    with pytest.raises(ModuleNotFoundError, match=f"{name} is not installed"):
        module.monitor_callback({"w": ROWS})


def test_a_real_trainer(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 4)

        def forward(self, x, labels=None):
            logits = self.inner(x)
            return torch.nn.functional.cross_entropy(logits, labels), logits

    data = [{"x": torch.randn(3), "labels": k % 4} for k in range(16)]
    callback = huggingface.monitor_callback({"inner.weight": ROWS}, every=1)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no"
    )
    transformers.Trainer(Net(), args, train_dataset=data, callbacks=[callback]).train()
    assert callback.monitor.run.steps.tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_a_real_lightning_trainer():
    home = pytest.importorskip("lightning")

    class Net(home.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 4)

        def training_step(self, batch, _):
            x, y = batch
            return torch.nn.functional.cross_entropy(self.inner(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Logged(home.Callback):
        def on_train_end(self, trainer, _):
            self.metrics = dict(trainer.logged_metrics)

    data = [(torch.randn(3), k % 4) for k in range(16)]
    watch, logged = lightning.monitor_callback({"inner.weight": ROWS}, every=2), Logged()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = home.Trainer(
        max_steps=5, accelerator="cpu", callbacks=[watch, logged], **dict.fromkeys(quiet, False)
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=4))
    assert watch.monitor.run.steps.tolist() == [0, 2, 4]
    assert logged.metrics["onsphere/norm/inner.weight"] > 0


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.h = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, labels=None):
        logits = self.h[1](torch.relu(self.h[0](x)))
        return torch.nn.functional.cross_entropy(logits, labels), logits


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_metrics_reach_a_tensorboard_of_the_trainer(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    transformers = pytest.importorskip("transformers")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    spheres = {f"h.{k}.weight": ROWS for k in range(2)}
    data = [{"x": torch.randn(4), "labels": k % 4} for k in range(16)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=2, report_to=["tensorboard"], use_cpu=True,
        save_strategy="no", per_device_train_batch_size=4, eval_strategy="steps", eval_steps=4,
    )  # fmt: skip
    callback = huggingface.monitor_callback(spheres, every=1)
    trainer = transformers.Trainer(
        TwoLayers(), args, train_dataset=data, eval_dataset=data, callbacks=[callback]
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    events = board.Scalars("train/onsphere/rotation/h.all.weight")
    assert [event.step for event in events] == [2, 4]
    logged = [row for row in trainer.state.log_history if "onsphere/norm/h.all.weight" in row]
    assert [row["step"] for row in logged] == [2, 4]
    assert all("loss" in row for row in logged)
    assert [k for k in logged[0] if k.startswith("onsphere/norm")] == ["onsphere/norm/h.all.weight"]


def test_the_callback_is_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    callback = huggingface.monitor_callback({"w": ROWS}, every=1)
    assert isinstance(callback, transformers.TrainerCallback)
    net, optimizer = weights()
    handler = transformers.trainer_callback.CallbackHandler([callback], net, None, optimizer, None)
    args, state = SimpleNamespace(), transformers.TrainerState()
    control = transformers.TrainerControl()
    handler.on_train_begin(args, state, control)
    train(net, optimizer, 2)
    logs = {}
    handler.on_log(args, state, control, logs)
    handler.on_train_end(args, state, control)
    assert callback.monitor.run.steps.tolist() == [0, 1]
    assert "onsphere/norm/w" in logs


def test_a_training_that_starts_anew_does_not_replace_the_last_one(fake_lightning, tmp_path):
    """With the same file it is refused with a line, unless start=0 says so."""
    net, optimizer = weights()
    path = tmp_path / "run.jsonl"
    trainer = SimpleNamespace(optimizers=[optimizer], global_step=0)
    module = SimpleNamespace(log_dict=lambda _: None)
    begin = {"model": net, "optimizer": optimizer}

    def lightning_starts(**options):
        watch = lightning.monitor_callback({"w": ROWS}, model=net, every=1, path=path, **options)
        watch.on_train_start(trainer, module)
        return lambda: watch.on_train_end(trainer, module)

    def hugging_face_starts(**options):
        watch = huggingface.Watch({"w": ROWS}, every=1, path=path, **options)
        watch.on_train_begin(None, SimpleNamespace(global_step=0), None, **begin)
        return lambda: watch.on_train_end(None, None, None)

    for start in (lightning_starts, hugging_face_starts):
        path.unlink(missing_ok=True)
        end = start()
        train(net, optimizer, 3)
        end()
        with pytest.raises(RunError, match="give start= to go on"):
            start()
        assert Run.read(path).steps.tolist() == [0, 1, 2]
        end = start(start=0)
        train(net, optimizer, 1)
        end()
        assert Run.read(path).steps.tolist() == [0]


def test_a_second_training_closes_the_first_monitor(fake_lightning):
    net, optimizer = weights()
    begin = {"model": net, "optimizer": optimizer}
    hugging = huggingface.Watch({"w": ROWS}, every=1)
    hugging.on_train_begin(None, SimpleNamespace(global_step=0), None, **begin)
    first = hugging.monitor
    hugging.on_train_begin(None, SimpleNamespace(global_step=0), None, **begin)
    train(net, optimizer, 1)
    assert first.run.samples == []
    hugging.on_train_end(None, None, None)

    logged = []
    trainer = SimpleNamespace(optimizers=[optimizer], global_step=0)
    module = SimpleNamespace(log_dict=logged.append)
    watch = lightning.monitor_callback({"w": ROWS}, model=net, every=1)
    for _ in range(2):
        earlier = watch.monitor
        watch.on_train_start(trainer, module)
        train(net, optimizer, 2, lambda: watch.on_train_batch_end(trainer, module))
    assert len(earlier.run.samples) == 2
    assert len(logged) == 4, "each sample of both"
    watch.on_train_end(trainer, module)
