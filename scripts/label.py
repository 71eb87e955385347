"""Turn unlabeled images and class names into pseudo instance masks.

Commands:

    python scripts/label.py images/ --output labels/ --vocabulary bear,deer,otter \\
        --clip openai/clip-vit-base-patch16 --background sky,grass,wall,background --min-confidence 0.5
    python scripts/label.py images/ --output labels/ --labeler foreground --backbone timm:mobilenetv2_100 \\
        --backbone-weights mobilenetv2_100.safetensors networks.pad_type=same
    python scripts/label.py images/ --output labels/ --labeler foreground --backbone timm:mobilenetv2_100 \\
        --backbone-weights mobilenetv2_100.safetensors networks.pad_type=same --namer classifier \\
        namer.class_map=src/uplvp_hf/assets/animals7_classes.yaml
    python scripts/label.py images/ --output labels/ --labeler sam --model facebook/sam-vit-base \\
        --namer clip --clip openai/clip-vit-base-patch16 --vocabulary names.txt --background stuff --min-confidence 0.6
    python scripts/label.py images/ --output labels/ --labeler segmenter --model runs/model
    python scripts/label.py images/ --output labels/ --labeler file --masks results.json labeler.min_score=0.3
    python scripts/label.py images/ --output labels/ --labeler my_package.my_module:factory labeler.level=3
    python scripts/label.py labels/ --report output.truth=few/train.json
    python scripts/label.py --labeler clip --help
    accelerate launch --num_processes 8 scripts/label.py images/ --output labels/ --vocabulary names.txt \\
        --clip openai/clip-vit-base-patch16 --background sky,grass,wall,background --min-confidence 0.5

With CLIP, `--background sky,grass,wall,background --min-confidence 0.5` is recommended: masks of what is no object lose
their probability to the background names and are dropped. Under `accelerate launch` each process takes its share.
docs/labeling.md is the guide.
"""

import sys

from uplvp_hf.commands.label import main

if __name__ == "__main__":
    sys.exit(main())
