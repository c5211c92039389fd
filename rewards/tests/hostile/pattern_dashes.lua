-- may end in: timeout instructions runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return string.match(string.rep("x", 200000), ".-.-.-.-.-.-y") end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
