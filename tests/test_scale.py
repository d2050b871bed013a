"""Beyond one process: the accelerate configurations, two real processes, DDP and FSDP2 on two gloo ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from modeling_dms.training.cli import app
from modeling_dms.training.data import PromptCollator, load_easy_vqa
from modeling_dms.training.models.loading import load
from tests import processes, tiny
from tests.training.conftest import calibrate_up_to


CONFIGURATIONS = Path(__file__).resolve().parent.parent / "configuration/accelerate"
# file: type of distribution, processes, precision, on the CPU
EXPECTED = {
    "cpu": (DistributedType.NO, 1, "no", True),
    "cpu_2": (DistributedType.MULTI_GPU, 2, "no", True),
    "gpu": (DistributedType.NO, 1, "bf16", False),
    "ddp": (DistributedType.MULTI_GPU, 8, "bf16", False),
    "fsdp2": (DistributedType.FSDP, 8, "bf16", False),
    "zero3": (DistributedType.DEEPSPEED, 8, "bf16", False),
}
BLIP2_LAYERS = "OPTDecoderLayer,Blip2EncoderLayer,Blip2QFormerLayer"  # as the comment in fsdp2.yaml has it

# ---- configurations


def test_every_configuration_is_known():
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_configuration_loads(name):
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    found = (config.distributed_type, config.num_processes, config.mixed_precision, config.use_cpu)
    assert found == EXPECTED[name]


def _wrapped_by_accelerate(model, layers=None):
    """Modules that accelerate shards by themselves under fsdp2.yaml, innermost first."""
    config = load_config_from_file(str(CONFIGURATIONS / "fsdp2.yaml")).fsdp_config
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"],
        auto_wrap_policy=config["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=(layers or config["fsdp_transformer_layer_cls_to_wrap"]).split(","),
        state_dict_type=config["fsdp_state_dict_type"],
        reshard_after_forward=config["fsdp_reshard_after_forward"],
    )
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    return [module for module in reversed(list(model.modules())) if policy(module)]


@pytest.mark.parametrize(
    ("backbone", "layers", "count"), [("llava-llama", None, 2 + 2), ("blip2-opt", BLIP2_LAYERS, 2 + 2 + 2)]
)
def test_fsdp2_shards_the_transformer_layers(backbone, layers, count):
    assert len(_wrapped_by_accelerate(tiny.shared(backbone), layers)) == count
    assert layers is None or layers in (CONFIGURATIONS / "fsdp2.yaml").read_text()


# ---- two ranks

WAYS = ("ddp", "fsdp", "fsdp, checkpointing", "fsdp, head and embeddings by themselves")
LR = 0.1
PROMPT = ("input_ids", "attention_mask", "pixel_values")
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def _model(**dms):
    """Calibrated and "trained". No contrastive loss: its negatives are the rest of the process's own batch."""
    model = tiny.build("llava-llama", scheduler="learned", stirred=True, lambda_consistency=0, **dms)
    model.calibrate(tiny.clean_samples(), level=2, show_progress=False)
    return model.train()


def _inputs():
    """Four samples with equally many labels, so that the mean over processes is the mean over the batch."""
    return tiny.batch([tiny.PAIR] * 4, labels=3) | {"schedule_target": tiny.uneven(4)}


def _whole(state):
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in state}


def _step(model, inputs):
    """Loss, gradients, and parameters and buffers after one step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss = model(**inputs).loss
    loss.backward()
    named = dict(model.named_parameters())
    gradients = _whole((name, p.grad) for name, p in named.items() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.detach(), "gradients": gradients, "state": _whole(model.state_dict().items())}


def _distributed(way):
    model = _model()
    if way == "ddp":
        # LLaVA never runs its last vision layer
        return DistributedDataParallel(model, find_unused_parameters=True)
    if "checkpointing" in way:
        model.gradient_checkpointing_enable()
    inner = _wrapped_by_accelerate(model)
    if "head" in way:
        inner += [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in inner:
        fully_shard(module)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")
    return model


def _rank(rank, directory):
    """One of two processes: a step in every way, on its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    inputs = {name: value.chunk(2)[rank] for name, value in _inputs().items()}
    prompt = {name: inputs[name] for name in PROMPT}
    results = {}
    for way in WAYS:
        model = _distributed(way)
        result = results[way] = _step(model, inputs)
        dist.all_reduce(result["loss"])
        result["loss"] /= 2
        if way == "ddp":
            for part in ("gradients", "state"):
                result[part] = {name.removeprefix("module."): value for name, value in result[part].items()}
            continue
        result["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
        result["generated"] = model.eval().generate(**prompt, **GREEDY)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found."""
    directory = tmp_path_factory.mktemp("ranks")
    assert processes.run(_rank, str(directory), count=2) == [0, 0]
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    """The same step on the whole batch in one process."""
    model = _model()
    before = _whole(model.state_dict().items())
    result = _step(model, _inputs())
    prompt = {name: _inputs()[name] for name in PROMPT}
    result["generated"] = model.eval().generate(**prompt, **GREEDY)
    return result | {"before": before}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_step_as_one_process(ranks, alone, way):
    assert max(float((alone["state"][n] - alone["before"][n]).abs().max()) for n in alone["gradients"]) > 1e-2
    for found in (rank[way] for rank in ranks):
        torch.testing.assert_close(found["loss"], alone["loss"], rtol=0, atol=1e-4)
        assert found["state"].keys() == alone["state"].keys()
        for part in ("gradients", "state"):
            for name, expected in alone[part].items():
                difference = float((found[part][name] - expected).abs().max())
                assert difference <= 1e-4, (part, name, difference)


@pytest.mark.parametrize("way", WAYS)
def test_calibration_stays_whole_and_float32(ranks, alone, way):
    names = [name for name in alone["before"] if name.startswith("dms.calibration.")]
    assert any(alone["before"][name].abs().max() > 0 for name in names)
    for found in (rank[way]["state"] for rank in ranks):
        for name in names:
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], alone["before"][name]), name


@pytest.mark.parametrize("way", WAYS[1:])
def test_everything_is_sharded_and_generates(ranks, alone, way):
    assert all(rank[way]["sharded"] for rank in ranks)
    assert torch.equal(torch.cat([rank[way]["generated"] for rank in ranks]), alone["generated"])


# ---- dms train

# by plain gradients: Adam takes a step of full size, in one direction or the other, where a gradient is rounding alone
_TRAIN = """
--config demo-scheduler --stage joint --lora_rank 2 --max_samples 800 --calibration_samples 60 --max_steps 4
--logging_steps 1 --save_strategy no --optim sgd --learning_rate 0.1 --warmup_steps 0 --use_cpu true
"""
# no contrastive loss: its negatives are the rest of the process's own batch
_LOSSES = '{"scheduler": "learned", "lambda_consistency": 0, "lambda_schedule": 1}'


def test_the_launcher_starts_two_processes_that_know_of_each_other(tmp_path):
    path, script = CONFIGURATIONS / "cpu_2.yaml", tmp_path / "script.py"
    # each says it in a file of its own: what both print may run together
    script.write_text(
        "from pathlib import Path\nfrom accelerate import PartialState\nstate = PartialState(cpu=True)\n"
        "Path(__file__).with_name(f'{state.process_index}.txt').write_text(str(state.num_processes))"
    )
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(path), str(script)]
    # the yaml alone starts two that know nothing of each other
    assert "ACCELERATE_USE_CPU=true accelerate launch --config_file" in path.read_text()
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch], env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_text() for path in tmp_path.glob("*.txt")} == {"0.txt": "2", "1.txt": "2"}


def train_as(rank, command, store):
    processes.joined(rank, 2, store)
    calibrate_up_to(pytest.MonkeyPatch(), 2)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output[-3000:]


def test_dms_train_on_two_processes_equals_one(tmp_path, monkeypatch):
    """With its own calibration: the same samples, corruptions, losses and weights."""
    calibrate_up_to(monkeypatch, 2)
    logs, states = [], []
    for count, batch in ((1, 4), (2, 2)):
        run = tmp_path / str(count)
        command = ["train", *_TRAIN.split(), "--dms", _LOSSES]
        command += ["--per_device_train_batch_size", str(batch), "--output_dir", str(run)]
        if count == 1:
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 0, done.output[-3000:]
        else:
            assert processes.run(train_as, command, tmp_path / "store", count=count) == [0, 0]
        logs.append([row for row in json.loads((run / "log.json").read_text()) if "loss" in row])
        states.append(load_file(run / "final/adapter_model.safetensors"))
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        # the spread is a difference of squares
        assert all(abs(one[name] - two[name]) < 1e-4 for name in one if "spread" not in name)
    assert states[0].keys() == states[1].keys()
    assert max(float(value.abs().max()) for name, value in states[0].items() if "lora_B" in name) > 1e-4
    for name, value in states[0].items():
        if "calibration" not in name:
            assert (states[1][name] - value).abs().max() < 1e-4, name
    # statistics that are fitted to the trained model afterwards magnify its rounding, and principal directions of
    # nearly the same variance turn into each other: what they say of samples is compared
    said = []
    for run in (tmp_path / "1", tmp_path / "2"):
        model, processor = load(run / "final")
        assert model.dms.calibration.is_calibrated
        batch = PromptCollator(processor)(load_easy_vqa("test")[::200][:24])
        said.append(model.eval().get_modality_weights(**batch)[1])
    for name, value in said[0].items():
        torch.testing.assert_close(said[1][name], value, atol=1e-2, rtol=1e-2, msg=name)
