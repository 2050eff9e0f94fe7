"""What VBench and VBench-2.0 read: their dimensions, the folder of each, the number of videos and their names.

Sources, all in https://github.com/Vchitect/VBench: `prompts/README.md`, `evaluate.sh` and `vbench/__init__.py` for
VBench; `VBench-2.0/prompts/README.md`, `VBench-2.0/evaluate.sh` and `VBench-2.0/vbench2/__init__.py` for VBench-2.0.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
      name: its name.
      folders: for each dimension, the folder of the videos that it is measured on.
      videos: number of videos of a prompt.
      more_videos: the same for dimensions with another number.
      name_characters: characters of the prompt in a video's name; None for all of them.
    """

    name: str
    folders: Mapping[str, str]
    videos: int
    more_videos: Mapping[str, int]
    name_characters: int | None = None

    def videos_of(self, folder: str) -> int:
        """Number of videos of each prompt in a folder."""
        return self.more_videos.get(folder, self.videos)


def _own_folder(*dimensions: str) -> dict[str, str]:
    return {dimension: dimension for dimension in dimensions}


VBENCH = Benchmark(
    "VBench",
    {
        **_own_folder("appearance_style", "color", "human_action", "multiple_objects", "object_class"),
        **_own_folder("overall_consistency", "scene", "spatial_relationship", "subject_consistency"),
        **_own_folder("temporal_flickering", "temporal_style"),
        **dict.fromkeys(("aesthetic_quality", "imaging_quality"), "overall_consistency"),
        **dict.fromkeys(("dynamic_degree", "motion_smoothness"), "subject_consistency"),
        "background_consistency": "scene",
    },
    videos=5,
    # `static_filter` keeps five videos that hardly move, so more are needed.
    more_videos={"temporal_flickering": 25},
)

VBENCH_2 = Benchmark(
    "VBench-2.0",
    {
        **_own_folder("Camera_Motion", "Complex_Landscape", "Complex_Plot", "Composition", "Diversity"),
        **_own_folder("Dynamic_Attribute", "Dynamic_Spatial_Relationship", "Human_Anatomy", "Human_Clothes"),
        **_own_folder("Human_Identity", "Human_Interaction", "Instance_Preservation", "Material", "Mechanics"),
        **_own_folder("Motion_Order_Understanding", "Motion_Rationality", "Multi-View_Consistency", "Thermotics"),
    },
    videos=3,
    more_videos={"Diversity": 20},
    name_characters=180,
)

BENCHMARKS = (VBENCH, VBENCH_2)
