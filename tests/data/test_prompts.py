import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hy_prfl.data.prompts import VideoPrompt, check_prompts, read_prompts


def write(path: Path, rows: object) -> Path:
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


class TestReadPrompts:
    def test_json(self, tmp_path: Path) -> None:
        rows = [{"caption": "a cat"}, {"prompt": "a dog", "id": "dog", "seed": 7, "image": "dog.png"}]
        assert read_prompts(write(tmp_path / "p.json", rows), seed=3) == [
            VideoPrompt(id="00000", caption="a cat", seed=3),
            VideoPrompt(id="dog", caption="a dog", seed=7, image=tmp_path / "dog.png"),
        ]

    def test_upstream(self, tmp_path: Path) -> None:
        rows = [{"caption": "x", "image_id": "v1", "image_path": "/a.png", "last_image_path": "b.png", "seed": 42}]
        assert read_prompts(write(tmp_path / "temp_prfl_infer_data.json", rows)) == [
            VideoPrompt(id="v1", caption="x", seed=42, image=Path("/a.png"), last_image=tmp_path / "b.png")
        ]

    def test_jsonl_csv_and_text(self, tmp_path: Path) -> None:
        expected = [
            VideoPrompt(id="00000", caption="a cat, black", seed=1),
            VideoPrompt(id="00001", caption="a dog", seed=1),
        ]
        lines = '{"caption": "a cat, black", "seed": 1}\n\n{"caption": "a dog", "seed": "1"}\n'
        assert read_prompts(write(tmp_path / "p.jsonl", lines)) == expected
        assert read_prompts(write(tmp_path / "p.csv", 'caption,seed\n"a cat, black",1\na dog,1\n')) == expected
        assert read_prompts(write(tmp_path / "p.txt", "a cat, black\n\n  a dog \n"), seed=1) == expected

    def test_several_videos(self, tmp_path: Path) -> None:
        prompts = read_prompts(write(tmp_path / "p.txt", "a cat\na dog"), seed=5, num_videos_per_prompt=2)
        assert [prompt.name for prompt in prompts] == [
            "00000_seed_5",
            "00000_seed_6",
            "00001_seed_5",
            "00001_seed_6",
        ]

    def test_ids_become_names_of_files(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        longest = 255 - len("._seed_7.mp4.tmp")
        path.write_text(json.dumps([{"caption": "x", "id": "a" * longest, "seed": 7}]))
        (prompt,) = read_prompts(path)
        (tmp_path / f".{prompt.name}.mp4.tmp").touch()
        for name, seed, number in (("a" * (longest + 1), 7, 1), ("a" * longest, 9, 2), ("a" * 300, 0, 1)):
            path.write_text(json.dumps([{"caption": "x"}, {"caption": "x", "id": name, "seed": seed}]))
            with pytest.raises(
                ValueError, match=r"p\.json, row 2: `id` .* is too long for a file name, at most 2\d\d"
            ):
                read_prompts(path, num_videos_per_prompt=number)

    def test_seeds_of_the_videos_of_a_row(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        path.write_text(json.dumps([{"caption": "x", "seed": 10**18 - 2}]))
        assert [prompt.seed for prompt in read_prompts(path, num_videos_per_prompt=2)] == [10**18 - 2, 10**18 - 1]
        with pytest.raises(ValueError, match=r"p\.json, row 1: `seed` .* of its video 3 is 10\^18 or more"):
            read_prompts(path, num_videos_per_prompt=3)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("[{", r"p\.json: not valid JSON"),
            ({"caption": "x"}, r"p\.json: expected a JSON list"),
            ([], r"p\.json: the file has no prompts"),
            (["x"], r"p\.json, row 1: expected a mapping"),
            ([{"caption": "x"}, {"id": "b"}], "row 2: `caption` is missing"),
            ([{"caption": "  "}], "row 1: `caption` is missing"),
            ([{"caption": 3.5}], "`caption` must be text"),
            (
                [{"caption": "x", "topic": "y"}],
                r"unknown fields: topic\. Columns found: caption, topic\. Columns wanted: cap",
            ),
            ([{"caption": "x", "text": "y"}], "`caption` and `text` mean the same but differ"),
            ([{"caption": "x", "prompt": "y"}], "mean the same but differ"),
            ([{"caption": "x", "seed": -1}], "row 1: `seed` must be a whole number"),
            ([{"caption": "x", "seed": "one"}], "row 1: `seed` must be a whole number"),
            ([{"caption": "x", "seed": 1.5}], "`seed` must be"),
            ([{"caption": "x", "id": "a/b"}], "row 1: `id` becomes a file name"),
            ([{"caption": "x", "id": ".hidden"}], "row 1: `id` becomes a file name"),
            ([{"caption": "x", "id": "a"}, {"caption": "y", "id": "a"}], "row 2: `id` 'a' with seed 0 is already"),
            (
                [{"caption": "x", "id": "a"}, {"caption": "x", "id": "a", "image": "a.png"}],
                "row 2: `id` 'a' with seed 0 is already taken by .*row 1",
            ),
        ],
    )
    def test_broken(self, tmp_path: Path, rows: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_prompts(write(tmp_path / "p.json", rows))

    def test_the_same_row_several_times_is_one_row(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Upstream's sample list names each of three prompts several times."""
        rows = [
            {"image_id": str(index), "image_path": f"/ref imgs/{index}.jpg", "caption": f"a bear {index}", "seed": 7}
            for index in range(3)
        ]
        respelt = {"id": 1, "image": "/ref imgs/1.jpg", "prompt": "a bear 1 ", "seed": "7"}
        path = write(tmp_path / "temp_prfl_infer_data.json", [*rows, *rows, respelt, *rows])
        assert [prompt.name for prompt in read_prompts(path)] == ["0_seed_7", "1_seed_7", "2_seed_7"]
        assert "temp_prfl_infer_data.json: 7 of 10 rows repeat an earlier one and are left out" in caplog.text
        assert len(read_prompts(path, num_videos_per_prompt=2)) == 6

    def test_rows_without_an_id_are_videos_of_their_own(self, tmp_path: Path) -> None:
        names = [prompt.name for prompt in read_prompts(write(tmp_path / "p.txt", "a cat\na cat\n"))]
        assert names == ["00000_seed_0", "00001_seed_0"]

    def test_images_are_looked_up_from_the_working_directory_and_then_beside_the_list(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
        beside = tmp_path / "temp_data"
        (beside / "ref_imgs").mkdir(parents=True)
        for name in ("a bear.jpg", "b.jpg"):
            image.save(beside / "ref_imgs" / name)
        rows = [
            {"image_id": "a", "image_path": "temp_data/ref_imgs/a bear.jpg", "caption": "x"},
            {"image_id": "b", "image_path": "ref_imgs/b.jpg", "caption": "x"},
            {"image_id": "c", "image_path": "ref_imgs/c.jpg", "caption": "x"},
        ]
        write(beside / "data.json", rows)
        monkeypatch.chdir(tmp_path)
        prompts = read_prompts("temp_data/data.json")
        assert prompts[0].image == Path("temp_data/ref_imgs/a bear.jpg")
        assert prompts[1].image == Path("temp_data/ref_imgs/b.jpg")
        check_prompts(prompts[:2], image_to_video=True, last_image="none")
        both = f"neither '{tmp_path}/ref_imgs/c.jpg' nor '{beside}/ref_imgs/c.jpg'"
        with pytest.raises(ValueError, match=f"prompt 'c': there is {both}"):
            check_prompts(prompts, image_to_video=True, last_image="none")

    def test_no_file(self, tmp_path: Path) -> None:
        for name in ("p.txt", "p.json"):
            with pytest.raises(FileNotFoundError, match=name):
                read_prompts(tmp_path / name)
        with pytest.raises(ValueError, match=r"p\.txt: the file has no prompts"):
            read_prompts(write(tmp_path / "p.txt", "\n\n"))


class TestCheckPrompts:
    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
        return tmp_path / "a.png"

    def test_good(self, image: Path) -> None:
        text = [VideoPrompt(id="a", caption="x")]
        check_prompts(text, image_to_video=False, last_image="none")
        one = [VideoPrompt(id="a", caption="x", image=image)]
        two = [VideoPrompt(id="a", caption="x", image=image, last_image=image)]
        check_prompts(one, image_to_video=True, last_image="none")
        check_prompts(one + two, image_to_video=True, last_image="optional")
        check_prompts(two, image_to_video=True, last_image="required")

    @pytest.mark.parametrize(
        ("images", "pipeline", "message"),
        [
            (("a.png", None), (False, "none"), "'a' has an image, but the pipeline is text-to-video"),
            ((None, None), (True, "none"), "'a': `image` is missing"),
            ((None, "a.png"), (True, "optional"), "'a': `image` is missing"),
            (("a.png", "a.png"), (True, "none"), "'a' has a `last_image`"),
            (("a.png", None), (True, "required"), "'a': `last_image` is missing"),
            (("b.png", None), (True, "none"), r"'a': the image .*b\.png"),
            (("bad.png", None), (True, "none"), r"'a': the image .*bad\.png"),
        ],
    )
    def test_bad(
        self,
        image: Path,
        images: tuple[str | None, str | None],
        pipeline: tuple[bool, str],
        message: str,
    ) -> None:
        (image.parent / "bad.png").write_bytes(b"no image")
        first, last = (None if name is None else image.parent / name for name in images)
        prompt = VideoPrompt(id="a", caption="x", image=first, last_image=last)
        with pytest.raises(ValueError, match=message):
            check_prompts([prompt], image_to_video=pipeline[0], last_image=pipeline[1])
