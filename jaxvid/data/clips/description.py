"""Description of evaluation views in words, for reports and pages."""

from jaxvid.data.clips.clip import ViewSpec

SAMPLINGS = {
    "segments": "one from each of {num_frames} equal segments of the video",
    "dense_stride": "evenly spaced over {num_frames} × {sampling_rate} frames at 30 fps",
    "uniform_10s": "evenly spaced over 10 seconds",
}
RESIZES = {"pil_bilinear": "with antialiasing", "torch_bilinear": "without antialiasing"}
COLOR_MATRICES = {"tagged": "with the matrix tagged in each file", "bt601": "with BT.601"}


def describe_views(views: ViewSpec) -> list[str]:
    """Describe the views of a video, one line per topic."""
    clips = f"{views.num_clips} {'clip' if views.num_clips == 1 else 'clips'}"
    crops = f"{views.num_crops} {'crop' if views.num_crops == 1 else 'crops'}"
    return [
        f"{clips} × {crops} per video",
        f"{views.num_frames} frames per clip, {describe_sampling(views)}",
        f"short side resized to {views.short_side} px {RESIZES[views.resize]}, "
        f"cropped to {views.crop} × {views.crop} px; converted to RGB "
        + COLOR_MATRICES[views.color_matrix],
    ]


def describe_sampling(views: ViewSpec) -> str:
    """Describe how the frames of a clip are selected."""
    words = SAMPLINGS[views.sampling].format(
        num_frames=views.num_frames, sampling_rate=views.sampling_rate
    )
    return words + (", sampled by timestamp" if views.by_time else "")
