-- One box for a phrase. Reads `box` ({x1, y1, x2, y2}), or for the published rewards `solution` (the gold text).
-- Options: kind = "default" (components accuracy and format, known holes closed), "visual_rft" (GIoU + 1) or "vlm_r1" (REC);
-- for "default": score ("iou" or "giou"), threshold, several ("reject" or "first"), coordinates, gold_coordinates. Abstains without gold.
local DEFAULT = { "score", "threshold", "several", "coordinates", "gold_coordinates" }

function reward(sample, ctx)
  local kind = ctx.options.kind or "default"
  local found
  if kind == "default" then
    if sample.box == nil then return nil end
    local given = { image_size = sample.image_size }
    for _, name in DEFAULT do given[name] = ctx.options[name] end
    found = rft.boxes.grounding(sample.completion, sample.box, given)
  elseif sample.solution == nil then
    return nil
  elseif kind == "visual_rft" then
    found = rft.boxes.visual_rft_grounding(sample.completion, sample.solution)
  elseif kind == "vlm_r1" then
    found = rft.boxes.vlm_r1_rec(sample.completion, sample.solution,
      { input_size = sample.input_size, image_size = sample.image_size })
  else
    error("unknown kind " .. kind .. "; use default, visual_rft or vlm_r1")
  end
  return { accuracy = found.accuracy, format = found.format }
end
