# ruff: noqa: E501
"""Arguments of Python that are nearly right: NumPy's integers work, and what would be guessed at gets one line.

In a process of its own, because the tests' type checker would answer first.
"""

import json
import os
import subprocess
import sys

import pytest

CALLS = {
    "model.sample(np.int64(2), steps=np.int64(3), seed=np.int64(5)).shape[0]": 2,
    "int((model.sample(1, steps=3, seed=np.uint8(5)) != model.sample(1, steps=3, seed=5)).sum())": 0,
    "model.sample(1, steps=np.array([1.0, 0.5])).shape[0]": 1,
    "model.sample(1, steps=torch.tensor([1.0, 0.5])).shape[0]": 1,
    "undiffuse.nll(model, 'digits', images=np.int32(2), draws=np.int64(1))['images']": 2,
    "Key(np.int64(3)).normal(2).tolist() == Key(3).normal(2).tolist()": True,
    "model.sample(2, steps=3.0)": "steps = 3.0 is not possible; give a whole number such as 3",
    "model.sample(2.0)": "n = 2.0 is not possible; give a whole number such as 2",
    "model.sample('2')": "n = '2' is not possible; give a whole number",
    "model.sample(0)": "n = 0 is not possible; give 1 or more",
    "model.sample(True)": "n = True is not possible; give a whole number",
    "model.sample(1, seed=None)": "seed = None is not possible; give a whole number",
    "model.sample(1, seed=1.0)": "seed = 1.0 is not possible; give a whole number such as 1",
    "model.sample(1, batch=2.5)": "batch = 2.5 is not possible; give a whole number such as 2",
    "model.sample(1, steps=[])": "times none are not possible; give one or more from 1, which is noise, down to 0.0833333",
    "model.sample(1, label=3.0)": "label 3.0 is not possible: this model was trained without labels",
    "told(pets, 3.0, 2)": "label 3.0 is not possible; give a class, or a list of one for each image",
    "told(pets, {0, 1}, 2)": "label {0, 1} is not possible; give a class, or a list of one for each image",
    "told(pets, b'1', 2)": "label b'1' is not possible; give a class, or a list of one for each image",
    "told(pets, (1, np.int64(0)), 2).label.tolist()": [1, 0],
    "model.sample(1, steps=['a'])": "times ['a'] are not possible; give numbers",
    "undiffuse.load(3)": "model 3 is not possible; give the path or the name of one",
    "undiffuse.load(None)": "model None is not possible; give the path or the name of one",
    "list(undiffuse.open_data('digits', size=np.int64(4)).images.shape)": [1500, 1, 4, 4],
    "list(undiffuse.open_data('digits', size=(np.int64(4), 8)).images.shape)": [1500, 1, 4, 8],
    "undiffuse.open_data('digits', size=8.0)": "size = 8.0 is not possible; give a whole number such as 8",
    "undiffuse.open_data('digits', size='8')": "size = '8' is not possible; give a whole number",
    "undiffuse.open_data('digits', channels=3.0)": "channels = 3.0 is not possible; give a whole number such as 3",
    "undiffuse.train('digits', 'RUN', steps='1')": "steps = '1' is not possible; give a whole number",
    "undiffuse.train('digits', 'RUN', images=8.0)": "images = 8.0 is not possible; give a whole number such as 8",
    "undiffuse.train('digits', 'RUN', minutes='x')": "a budget of 'x' minutes is not possible; give a number",
    "undiffuse.train('digits', 'RUN', settings='train.lr=1')": "settings = 'train.lr=1' is not possible; give a list, such as ['train.lr=1']",
    "undiffuse.train('digits', 'RUN', init=3)": "init = 3 is not possible; give a model, or the path or name of one",
    "undiffuse.train('digits', 'RUN', init=['U'])": "init = ['U'] is not possible; give a model, or the path or name of one",
    "undiffuse.show(torch.rand(2, 1, 4, 4))": "Tensor torch.float32 [2, 1, 4, 4] cannot be shown; give a torch tensor of uint8 images [n, c, h, w], as sample() does",
    "undiffuse.show(np.zeros((2, 1, 4, 4), np.uint8))": "ndarray uint8 [2, 1, 4, 4] cannot be shown; give a torch tensor of uint8 images [n, c, h, w], as sample() does",
    "undiffuse.show([1])": "list  [] cannot be shown; give a torch tensor of uint8 images [n, c, h, w], as sample() does",
    "undiffuse.nll(model, 'digits', seed=None)": "seed = None is not possible; give a whole number",
    "undiffuse.nll(model, 'digits', images=2.0)": "images = 2.0 is not possible; give a whole number such as 2",
    "undiffuse.evaluate(3, 'digits')": "samples of type int are not possible; give a model, a path, or a torch tensor of uint8 [n, c, h, w]",
    "undiffuse.train(None, 'RUN')": "data = None is not possible; give a path, the name of a set, or a list of them",
    "undiffuse.train([], 'RUN')": "data = [] is not possible; give a path, the name of a set, or a list of them",
    "undiffuse.train('digits', None)": "out = None is not possible; give the path of a run folder",
    "undiffuse.evaluate(model, 'digits', n=2.0)": "n = 2.0 is not possible; give a whole number such as 2",
    "undiffuse.evaluate(half[None], 'digits')": "images of float32 [1, 1, 8, 8] cannot be judged; give uint8 [n, c, h, w], as sample() returns",
    "undiffuse.evaluate(model, 'digits', 3)": "features = 3 is not possible; give a name, a list of names, or a Query",
    "undiffuse.evaluate(model, 'digits', seed='1')": "seed = '1' is not possible; give a whole number",
    "explore.progressive(model, 1, seed=0.5, slots=2)": "seed = 0.5 is not possible; give a whole number such as 0",
    "explore.progressive(model, 1, slots=2.0)": "slots = 2.0 is not possible; give a whole number such as 2",
    "explore.shared(model, None)": "n = None is not possible; give a whole number",
    "explore.interpolate(model, half, half)": "the first picture: values of type float32; expected uint8 from 0 to 255. "
    "For values in [0, 1] give (255 * x).round().to(torch.uint8)",
    "explore.neighbours(half[None], digits)": "samples: values of type float32; expected uint8 from 0 to 255. For values "
    "in [0, 1] give (255 * x).round().to(torch.uint8)",
    "explore.neighbours(model.sample(1), digits, k=1.0)": "k = 1.0 is not possible; give a whole number such as 1",
}  # fmt: skip

PROGRAM = """
import json, sys
import numpy as np, torch, undiffuse
from undiffuse.errors import UsageError
from undiffuse.key import Key
from undiffuse.model.classes import Classes, told
from undiffuse.view import explore
pets = Classes(("cat", "dog"), (1, 1), True)
model, digits, half = undiffuse.load(sys.argv[1]), undiffuse.open_data("digits"), torch.full((1, 8, 8), 0.5)
for call in json.loads(sys.argv[2]):
    try:
        print(json.dumps(eval(call)))
    except UsageError as error:
        print(json.dumps(str(error)))
    except Exception as error:
        print(json.dumps(repr(error)))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    from tests.cli.toy import save

    model = save(tmp_path_factory.mktemp("model") / "MODEL")
    words = [sys.executable, "-c", PROGRAM, str(model), json.dumps(list(CALLS))]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return dict(zip(CALLS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_is_taken_or_refused_in_one_line(answers, call):
    assert answers[call] == CALLS[call]
