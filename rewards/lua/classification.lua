-- One class name. 1 where the answer is `label` of the row (case, spaces and punctuation aside), else 0; abstains without a label.
-- An empty answer and a list of all classes earn nothing. Option kind = "visual_rft" gives the published reward, which pays both.
function reward(sample, ctx)
  if sample.label == nil then return nil end
  if ctx.options.kind == "visual_rft" then
    local found = rft.boxes.visual_rft_classification(sample.completion, sample.label)
    return { accuracy = found.accuracy, format = found.format }
  end
  return rft.boxes.classification(sample.completion, sample.label, { aliases = sample.aliases })
end
