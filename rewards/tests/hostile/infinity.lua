-- may end in: not_finite
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return math.huge end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
