-- Intersection over union of the first box [x1, y1, x2, y2] in the completion with `box` of the row (same coordinates).
-- No box, or an inverted one, is 0; abstains without a gold box.
-- ASCII digits and blanks only: a pattern of all of Unicode's is too large for long texts
local NUMBER = "[ \\t\\r\\n]*(-?[0-9]+(?:\\.[0-9]+)?)[ \\t\\r\\n]*"
local BOX = "\\[" .. NUMBER .. "," .. NUMBER .. "," .. NUMBER .. "," .. NUMBER .. "\\]"

function reward(sample, ctx)
  if sample.box == nil then return nil end
  local found = rft.regex.match(sample.completion, BOX)
  if found == nil then return 0 end
  local box = { tonumber(found[1]), tonumber(found[2]), tonumber(found[3]), tonumber(found[4]) }
  return rft.boxes.iou(box, sample.box)
end
