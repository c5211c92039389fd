-- may end in: runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do error({ code = 1 }) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
