"""torchvision's operators that the losses and QueryInst's boxes need. Without torchvision, Mask2Former and K-Net still
load and predict."""

try:
    from torchvision.ops import box_iou, generalized_box_iou, generalized_box_iou_loss, roi_align, sigmoid_focal_loss
except ImportError:

    def _missing(*arguments, **keywords):
        raise ImportError("Training, and QueryInst, need torchvision: pip install torchvision")

    box_iou = generalized_box_iou = generalized_box_iou_loss = roi_align = sigmoid_focal_loss = _missing

__all__ = ["box_iou", "generalized_box_iou", "generalized_box_iou_loss", "roi_align", "sigmoid_focal_loss"]
