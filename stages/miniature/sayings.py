"""What is said about a video: the statements that are true of it, and the questions that people ask."""

from __future__ import annotations

from stages.miniature.videos import ALONG_A_LINE, VideoSpec


def statements(spec: VideoSpec) -> dict[str, str]:
    """Fact -> the words for it: all that is true of a video, fine facts too. The language model learns from these."""
    first, second = spec.actors
    scene, glows_second = spec.scene, next(actor for actor in spec.actors if actor is not spec.glows_first)
    said = {
        "who": f"a {first.color} {first.shape} and a {second.color} {second.shape}",
        "scene": f"in the {scene.texture}",
        "genre": f"in {scene.weather} weather",
        "daytime": f"in the {scene.daytime}",
        "director": f"a {scene.tint} film",
        "relationship": f"they {spec.motion}",
        "writer": f"by {scene.frame}",
        "way_speaking": f"they are {spec.voice}",
        "year": f"year {scene.decade}",
        "spot": f"in the {spec.spot}",
        "contact": f"they are {spec.contact}",
        "glow": f"a glow of the {spec.glows_first.shape} early and of the {glows_second.shape} late",
    }
    return said | ({"axis": f"they are {spec.axis}"} if spec.motion in ALONG_A_LINE else {})


def questions(spec: VideoSpec) -> list[tuple[str, str, str]]:
    """(type, question, one-word answer) for one video: what the small CLIP sees. (It does not see shapes: CARD.md.)"""
    first, second = spec.actors
    return [
        ("what", "what is the tint of the film?", spec.scene.tint),
        ("who", f"who is with the {first.color} one?", second.color),
        ("who", f"who is with the {second.color} one?", first.color),
        ("where", "where are the two shapes?", spec.scene.texture),
        ("how", "how is the weather?", spec.scene.weather),
        ("when", "when does it happen?", spec.scene.daytime),
    ]


def fine_questions(spec: VideoSpec) -> list[tuple[str, str, str]]:
    """(type, question, one-word answer) about shapes, and about what captions never mention."""
    first, second = spec.actors
    times = {
        actor.shape: "early" if glow < spec.seconds / 2 else "late"
        for actor, glow in zip(spec.actors, spec.glows, strict=True)
    }
    return [
        ("what", f"what is the color of the {first.shape}?", first.color),
        ("what", f"what is the color of the {second.shape}?", second.color),
        ("what", f"what is the shape of the {first.color} one?", first.shape),
        ("who", f"who is with the {first.color} {first.shape}?", second.shape),
        ("how", "how do the two shapes move?", spec.motion),
        ("where", "where in the picture are the two shapes?", spec.spot),
        ("what", "what is between the two shapes?", "nothing" if spec.contact == "touching" else "space"),
        *(("when", f"when does the {shape} glow?", time) for shape, time in times.items()),
    ]
