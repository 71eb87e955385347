"""What is claimed of prompts for semantic segmentation, for the arms of `recipes/scenes_icpc.yaml`: the claim, the arm
that should be better, and the other.

ICPC's abstract (arXiv 2308.07078) claims that prompts made from the image beat static ones and those of DenseCLIP, and
that its contrastive loss and several scales add to it. The pairs that make a claim fair are ours: an image's token is
compared with a learned vector in its place, the contrastive loss with its text-only control, every image's prompt with
that of another image; and the score maps alone, where a prompt acts at once, without the pyramid behind them.
"""

from .semantic import SCORE_MAP, SWAPPED

FORMS = ("names", "static", "static 9", "post", "dynamic_concat", "dynamic_add", "dynamic_last")

_FORMS = (
    ("learned vectors are at least names alone", "static", "names"),
    ("DenseCLIP's prompting behind the text tower is at least static", "post", "static"),
    ("an image's token beats a learned vector in its place", "dynamic_concat", "static 9"),
    ("an image's token on every learned vector beats none", "dynamic_add", "static"),
    ("an image's token behind the name beats a learned vector", "dynamic_last", "static 9"),
    ("prompting from the image before the text tower beats prompting behind it", "dynamic_concat", "post"),
)

PROMPT_CLAIMS = (
    ("score maps of the class names help", "names", "none"),
    *_FORMS,
    *((claim, f"{better}, {SCORE_MAP}", f"{worse}, {SCORE_MAP}") for claim, better, worse in _FORMS),
    ("all of ICPC beats DenseCLIP", "dynamic_concat multi + contrast", "post"),
    *(("an image's own prompt beats another's", form, f"{form}, {SWAPPED}") for form in FORMS[3:]),
    *(
        ("an image's own prompt beats another's", f"{form}, {SCORE_MAP}", f"{form}, {SCORE_MAP}, {SWAPPED}")
        for form in FORMS[3:]
    ),
    *(("the contrastive loss helps", f"{form} + contrast", form) for form in FORMS),
    *(("the contrastive loss beats its control", f"{form} + contrast", f"{form} + text only") for form in FORMS),
    *(("score maps of several scales help", f"{form} multi", form) for form in FORMS),
)
