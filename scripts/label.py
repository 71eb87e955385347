"""Turn unlabelled pictures and class names into pseudo instance masks.

Commands:

    python scripts/label.py pictures/ --output labels/ --vocabulary bear,deer,otter \\
        --clip openai/clip-vit-base-patch16 --background sky,grass,wall,background --min-confidence 0.5
    python scripts/label.py pictures/ --output labels/ --labeler foreground --backbone timm:mobilenetv2_100 \\
        --backbone-weights mobilenetv2_100.safetensors --pad-type same
    python scripts/label.py pictures/ --output labels/ --labeler foreground --backbone timm:mobilenetv2_100 \\
        --backbone-weights mobilenetv2_100.safetensors --pad-type same --namer classifier \\
        --class-map examples/animals7_classes.yaml
    accelerate launch --num_processes 8 scripts/label.py pictures/ --output labels/ --vocabulary names.txt \\
        --clip openai/clip-vit-base-patch16 --background sky,grass,wall,background --min-confidence 0.5

With CLIP, `--background sky,grass,wall,background --min-confidence 0.5` is recommended: masks of what is no object lose
their probability to the background names and are dropped. Under `accelerate launch` each process takes its share.
"""

import sys

from uplvp_hf.commands.label import main

if __name__ == "__main__":
    sys.exit(main())
