"""What the studies compare: objectives by name, as settings that win over a recipe."""

OBJECTIVES = {
    "forward_kl": ("objective={name: kd, divergence: forward_kl}",),
    "reverse_kl": ("objective={name: kd, divergence: reverse_kl}",),
    "jsd": ("objective={name: kd, divergence: jsd}",),
    "skew_kl": ("objective={name: kd, divergence: skew_kl}",),
    "minillm": ("objective={name: minillm}",),
    "minillm_paper": ("objective={name: minillm, preset: paper}",),
    "no_length_norm": ("objective={name: minillm, length_normalised: false}",),
    "no_teacher_mixing": ("objective={name: minillm}", "rollout.alpha=0"),
    "no_single_step": ("objective={name: minillm, single_step: false}",),
}

# Whose learning rate a variant takes.
VARIANT_OF = dict.fromkeys(("minillm_paper", "no_length_norm", "no_teacher_mixing", "no_single_step"), "minillm")
