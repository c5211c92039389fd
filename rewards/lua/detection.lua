-- Boxes of all objects. Reads `boxes` ({{label = .., bbox = {x1, y1, x2, y2}}, …}), or for the published rewards `solution` (the gold text).
-- Options: kind = "default" (components iou, f1, confidence, format; known holes closed), "visual_rft", "vision_r1" or "vlm_r1"
-- (the published ones, hole for hole); parts (names of the components to give); and for "default": iou_threshold, match_labels,
-- matching, coordinates, gold_coordinates; for "vision_r1": adaptive (refine by step). Abstains without gold.
local DEFAULT = { "iou_threshold", "match_labels", "matching", "coordinates", "gold_coordinates" }

local function boxes(sample, ctx)
  local options = ctx.options
  local kind = options.kind or "default"
  if kind == "visual_rft" or kind == "vlm_r1" then
    if sample.solution == nil then return nil end
    if kind == "vlm_r1" then return rft.boxes.vlm_r1_detection(sample.completion, sample.solution) end
    return rft.boxes.visual_rft_detection(sample.completion, sample.solution)
  end
  if sample.boxes == nil then return nil end
  if kind == "vision_r1" then
    return rft.boxes.vision_r1(sample.completion, sample.boxes, {
      step = options.adaptive and ctx.step or nil, input_size = sample.input_size, image_size = sample.image_size,
    })
  end
  if kind ~= "default" then error("unknown kind " .. kind .. "; use default, visual_rft, vision_r1 or vlm_r1") end
  local given = { image_size = sample.image_size }
  for _, name in DEFAULT do given[name] = options[name] end
  return rft.boxes.detection(sample.completion, sample.boxes, given)
end

local PARTS = {
  default = { "iou", "f1", "confidence", "format" }, visual_rft = { "iou", "confidence", "format" },
  vision_r1 = { "precision", "recall", "dual_format" }, vlm_r1 = { "od_length", "format" },
}

function reward(sample, ctx)
  local found = boxes(sample, ctx)
  if found == nil then return nil end
  local components = {}
  for _, part in ctx.options.parts or PARTS[ctx.options.kind or "default"] do
    local value = found[part]
    -- the published code raises here: no score, not 0
    if value == nil or value == rft.null then return nil end
    components[part] = value
  end
  return components
end
