-- may end in: memory runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return string.rep("x", 1e9) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
