"""A shipped model with classes, one by one: distances of as many samples as there are test images.

    python bench/styles.py emoji-32 --data FOLDER

Of each class, samples of the default solver are judged against the training images of that class on two extractors;
beside them stand the test images of the class. FD of so few images has a floor far above 0; the kernel distance has
none, and its standard error is given. Writes `bench/styles-NAME.json` and the table `styles-NAME` of
docs/benchmarks.md.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from machine import keep, machine, made_of, publish
from torch import Tensor

import undiffuse
from undiffuse.data.source import Source, open_source
from undiffuse.quality.feature.base import Extractor, open_features
from undiffuse.quality.metric.base import Moments
from undiffuse.quality.metric.frechet import frechet_of_rows, root
from undiffuse.quality.metric.kernel import kernel_distance, kernel_error

HERE, EXTRACTORS, BATCH = Path(__file__).parent, ("classifier-emoji", "efflite0"), 128
Row = dict[str, Any]


def of_class(source: Source, number: int) -> UInt8[Tensor, "n c h w"]:
    labels = source.every_label()
    assert labels is not None
    return source.gather((labels == number).nonzero()[:, 0])[0]


def features(extractor: Extractor, images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    return torch.cat([extractor(part).pool for part in images.split(BATCH)])


def apart(rows: Float[Tensor, "n d"], known: Float[Tensor, "m d"]) -> Row:
    moments = Moments()
    moments.update(known, torch.arange(len(known), dtype=torch.int64, device="cpu"))
    return {
        "fd": frechet_of_rows(rows, moments.mean, root(moments.covariance)),
        "kd": kernel_distance(rows, known),
        "kd_se": kernel_error(rows, known),
    }


def table(result: Row) -> str:
    heads = [f"{score}, {name}" for name in EXTRACTORS for score in ("FD", "KD")]
    lines = [f"| class | images | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for row in result["rows"]:
        cells = []
        for name in EXTRACTORS:
            ours, real = row[name]["samples"], row[name]["test"]
            cells.append(f"{ours['fd']:.3g} ({real['fd']:.3g})")
            cells.append(f"{ours['kd']:.3g} ± {ours['kd_se']:.1g} ({real['kd']:.2g})")
        lines.append(f"| {row['class']} | {row['images']} | {' | '.join(cells)} |")
    said = f"In brackets the test images of the class. {result['machine']['processor']}, {result['date']}"
    return "\n".join([*lines, "", f"{said}; `{result['command']}`."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a shipped model with classes")
    parser.add_argument("--data", required=True, help="the folder of its data")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = undiffuse.load(given.name, "cpu")
    assert model.classes is not None
    train, test = (open_source(given.data, channels=model.image_shape[0], split=split) for split in ("train", "test"))
    result: Row = {"made_of": made_of(given.name, *EXTRACTORS), "machine": machine(), "seed": 0, "rows": []}
    result |= {"command": f"python bench/styles.py {given.name} --data {given.data}", "date": date.today().isoformat()}
    for number in model.classes.trained:
        real, known = of_class(test, number), of_class(train, number)
        drawn = model.sample(len(real), label=number, batch=BATCH)
        row: Row = {"class": model.classes.names[number], "images": len(real)}
        for name in EXTRACTORS:
            extractor = open_features(name, "cpu")
            law = features(extractor, known)
            row[name] = {
                "samples": apart(features(extractor, drawn), law),
                "test": apart(features(extractor, real), law),
            }
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
    keep(HERE / f"styles-{given.name}.json", result)
    publish("benchmarks.md", f"styles-{given.name}", table(result))


if __name__ == "__main__":
    main()
