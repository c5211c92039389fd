-- may end in: ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return rft.math.equal("9^9^9^9^9", "1") and 1 or 0 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
