-- may end in: ok
function reward(sample, ctx)
  if sample.completion == "bad" then
    do sample.completion = "good" sample.extra = 1 ctx.options.x = 1 return 1 end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
