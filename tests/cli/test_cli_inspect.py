"""What `inspect` and `verify` say of what is there, and of what is not."""

import json

from tests.cli.toy import run_of_digits
from undiffuse.model.load import load, save


def test_verify_reads_the_average_that_sample_takes(call, tmp_path):
    run = run_of_digits(tmp_path / "run", 3)
    save(load(run), run / "best.safetensors")
    found = json.loads(call("verify", run, "--json")[1])
    assert found["best"] == 1 and found["damaged"] == "none"
    (run / "best.safetensors").write_bytes(b"no weights")
    code, out, _ = call("verify", run, "--json")
    assert code == 5 and json.loads(out)["best"] == 0 and list(json.loads(out)["damaged"]) == ["best.safetensors"]


def test_inspect_knows_the_nearest_preset(call):
    code, _, err = call("inspect", "cifar")
    assert code == 2 and 'model or preset "cifar" is not known. Did you mean "cifar10"? Known: celebahq-256' in err
